"""Kills a short run of two ranks with SIGKILL, resumes it, and compares it with one that nobody disturbed."""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cli import TINY, run_cli, start_cli
from make_data import make_shards
from safetensors.torch import load_file

RANKS, EPOCHS = 2, 3
HOW = ("one rank", "all ranks", "rank 0 in a save")
RESUME = ("--resume", "latest")


@dataclass
class Undisturbed:
    """A run to its end: what the killed ones are compared with."""

    arguments: list
    final: dict[str, torch.Tensor]
    seconds: float


@dataclass
class Kill:
    """What was done to a run, and what became of it."""

    how: str
    after: float  # seconds
    resumed_from: str  # a checkpoint, or "the start"
    equal: bool


def undisturbed(folder: Path, loss: str) -> Undisturbed:
    """Make the data and train on them once."""
    data = make_shards(folder / "data", shards=4, per_shard=24)
    arguments = [
        *TINY, "--loss", loss, "--train-data", data, "--epochs", EPOCHS, "--workers", 1, "--save-every", "2steps",
        "--dist-timeout", 20, "--name", "run",
    ]  # fmt: skip
    start = time.monotonic()
    run = run_cli([*arguments, "--logs", folder / "undisturbed"], folder / "out", ranks=RANKS)
    assert run.ok, run
    return Undisturbed(arguments, final_state(folder / "undisturbed"), time.monotonic() - start)


def final_state(logs: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer and FastCLIP's table at the end of a run, by name."""
    checkpoints = logs / "run" / "checkpoints"
    checkpoint = torch.load(checkpoints / f"epoch_{EPOCHS}.pt", weights_only=True)
    state = {f"model {name}": value for name, value in checkpoint["state_dict"].items()}
    for parameter, moments in checkpoint["optimizer"]["state"].items():
        state |= {f"optimizer {parameter} {name}": torch.as_tensor(value) for name, value in moments.items()}
    for file in sorted((checkpoints / f"epoch_{EPOCHS}.fastclip").glob("*.safetensors")):
        state |= {f"{file.name} {column}": rows for column, rows in load_file(file).items()}
    return state


def kill_and_resume(reference: Undisturbed, folder: Path, how: str, chance: random.Random) -> Kill:
    """Kill a run at a random moment and run the same command again. AssertionError if one ends as it should not."""
    arguments = [*reference.arguments, "--logs", folder, *RESUME]
    start = time.monotonic()
    run = start_cli(arguments, folder / "out", ranks=RANKS)
    if how == HOW[2]:
        _wait_for_a_save(folder / "run" / "checkpoints", number=chance.randint(1, 12), until=start + 60)
    else:
        time.sleep(chance.uniform(0.3, reference.seconds))
    after = time.monotonic() - start
    victims = {HOW[0]: [chance.choice(run.pids)], HOW[1]: run.pids, HOW[2]: run.pids[:1]}[how]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    ended = run.wait(60)
    survivors = [code for pid, code in zip(run.pids, ended.codes, strict=True) if pid not in victims]
    assert -signal.SIGKILL not in survivors, f"a rank hung after another was killed\n{ended}"
    again = run_cli(arguments, folder / "out", ranks=RANKS)
    assert again.ok, again
    final = final_state(folder)
    equal = final.keys() == reference.final.keys() and all(torch.equal(final[k], reference.final[k]) for k in final)
    return Kill(how, round(after, 1), _resumed_from(again.output[0]), equal)


def _wait_for_a_save(checkpoints: Path, number: int, until: float) -> None:
    """Return while the `number`-th save is under way, as its folder in the making shows."""
    seen = set()
    while time.monotonic() < until:
        seen |= {path.name for path in checkpoints.glob("*.tmp")}
        if len(seen) >= number:
            return
        time.sleep(0.001)
    raise AssertionError(f"only {len(seen)} saves were seen")


def _resumed_from(output: str) -> str:
    found = [line.rsplit("/", 1)[1].strip(" .") for line in output.splitlines() if "Found latest resume" in line]
    return found[0] if found else "the start"

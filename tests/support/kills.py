"""Ends a short run of two ranks, resumes it, and compares it with one that nobody has ended.

Most are killed with SIGKILL. Ctrl-C lets them save. An overflow gives NaN gradients in a step on one rank, which is to
be left out: such a run is killed as well, and compared with one with the same overflow that was not.
"""

import math
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import open_clip_train.main
import torch
from cli import INSTALLED_MODEL, TINY, run_cli, run_forked, start_forked
from make_data import make_shards
from safetensors.torch import load_file

from open_clip_train_fastclip.errors import EXIT_INTERRUPTED
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.openclip.checkpoints import RunState
from open_clip_train_fastclip.training.checkpointer import AsyncCheckpointer
from open_clip_train_fastclip.training.signals import EXIT_PREEMPTED

RANKS, EPOCHS = 2, 3
STEPS = 18  # of 96 samples in batches of 8 on each rank
HOW = ("one rank", "all ranks", "rank 0 in a save", "Ctrl-C", "all ranks, and an overflow")
RESUME = ("--resume", "latest")


@dataclass
class Undisturbed:
    """A run to its end: what the killed ones are compared with."""

    folder: Path
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
        "--dist-timeout", 20, "--name", "run", *INSTALLED_MODEL,
    ]  # fmt: skip
    start = time.monotonic()
    run = run_cli([*arguments, "--logs", folder / "undisturbed"], folder / "out", ranks=RANKS)
    assert run.ok, run
    return Undisturbed(folder, arguments, final_state(folder / "undisturbed"), time.monotonic() - start)


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
    final, overflow_at = reference.final, None
    if how == HOW[4]:
        overflow_at = chance.randrange(1, STEPS + 1)
        final = _final_with_overflow(reference, overflow_at)
    arguments = [*reference.arguments, "--logs", folder, *RESUME]
    start = time.monotonic()
    run = start_forked(_train, (arguments, overflow_at), folder / "out", ranks=RANKS)
    if how == HOW[2]:
        _wait_for_a_save(folder / "run" / "checkpoints", number=chance.randint(1, 12), until=start + 60)
    else:
        time.sleep(chance.uniform(0.3, reference.seconds))
    after = time.monotonic() - start
    victims = {HOW[0]: [chance.choice(run.pids)], HOW[2]: run.pids[:1]}.get(how, run.pids)
    for pid in victims:
        os.kill(pid, signal.SIGINT if how == HOW[3] else signal.SIGKILL)
    ended = run.wait(60)
    survivors = [code for pid, code in zip(run.pids, ended.codes, strict=True) if pid not in victims or how == HOW[3]]
    assert -signal.SIGKILL not in survivors, f"a rank hung after another was killed\n{ended}"
    if how == HOW[3]:
        assert set(ended.codes) <= {0, EXIT_PREEMPTED, EXIT_INTERRUPTED} and "Traceback" not in str(ended), ended
    again = run_forked(_train, (arguments, overflow_at), folder / "out", ranks=RANKS)
    assert again.ok, again
    ours = final_state(folder)
    equal = final.keys() == ours.keys() and all(torch.equal(ours[name], value) for name, value in final.items())
    return Kill(how, round(after, 1), _resumed_from(again.output[0]), equal)


def _train(arguments: list, overflow_at: int | None) -> int:
    """The command line; in step overflow_at, counted from 1 over all epochs, rank 1 has NaN gradients."""
    if overflow_at is None or os.environ["RANK"] != "1":
        return main(list(map(str, arguments)))
    create, checkpointer = open_clip_train.main.create_model_and_transforms, RunState.checkpointer
    at_boundary, steps = AsyncCheckpointer.at_boundary, []  # the last one is how many are done

    def create_with_overflow(model_name, *args, **kwargs):
        model, *transforms = create(model_name, *args, **kwargs)
        model.visual.conv1.weight.register_hook(lambda g: g * math.nan if steps[-1] == overflow_at - 1 else None)
        return model, *transforms

    def note_start(self, signals, start, resumed):
        steps.append(start.global_step)
        return checkpointer(self, signals, start, resumed)

    def note_step(self, progress, **how):
        steps.append(progress.global_step)
        at_boundary(self, progress, **how)

    open_clip_train.main.create_model_and_transforms = create_with_overflow
    RunState.checkpointer, AsyncCheckpointer.at_boundary = note_start, note_step
    return main(list(map(str, arguments)))


def _final_with_overflow(reference: Undisturbed, step: int) -> dict[str, torch.Tensor]:
    """The end of a run that has an overflow in a step and is not killed: finite, and one step short."""
    logs = reference.folder / f"overflow-{step}"
    if not logs.exists():
        run = run_forked(_train, ([*reference.arguments, "--logs", logs], step), logs / "out", ranks=RANKS)
        assert run.ok, run
    final = final_state(logs)
    for name, value in final.items():
        assert not value.isnan().any() and value.max() < math.inf, name  # log u of the unseen is -inf
    steps = {int(value) for name, value in final.items() if name.startswith("optimizer") and name.endswith(" step")}
    assert steps == {STEPS - 1}, steps
    return final


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

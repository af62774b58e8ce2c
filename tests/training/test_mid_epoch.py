"""Runs that are saved between two steps, end because of a signal, and go on, through the command line."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path
from threading import Semaphore

import pytest
import torch
from cli import INSTALLED_MODEL, TINY, run_cli, run_forked
from make_data import make_csv, make_shards
from open_clip_train.main import get_latest_checkpoint
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from open_clip_train_fastclip import preflight
from open_clip_train_fastclip.checkpoint import atomic, mid_epoch, retention
from open_clip_train_fastclip.checkpoint.table import read_index as read_state_index
from open_clip_train_fastclip.data.identity import DataIdentity
from open_clip_train_fastclip.data.position import DataPosition
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.training.checkpointer import AsyncCheckpointer
from open_clip_train_fastclip.training.save_trigger import Interval, SaveTrigger, parse_interval

SAMPLES = 48
EPOCHS = 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), shards=4, per_shard=SAMPLES // 4)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=SAMPLES)


def checkpoints(logs):
    return logs / "run" / "checkpoints"


def names(logs):
    """Mid-epoch checkpoints of a run, complete or not."""
    return sorted(path.name for path in checkpoints(logs).glob("epoch_*_step_*"))


def flags(logs, data, *more, loss="fastclip-v3", batch=4):
    given = [*TINY, "--loss", loss, "--train-data", data, "--logs", logs, "--name", "run", "--epochs", EPOCHS]
    return list(map(str, [*given, "--batch-size", batch, "--force-patch-dropout", 0.25, *more]))


def end_at(argv, boundary, number=signal.SIGUSR1, rank=0):
    """The command line, which gets a signal at its `boundary`-th boundary between steps (from 1) on one rank."""
    decide, seen = SaveTrigger.decide, 0

    def be_signalled_and_decide(self, progress, written):
        nonlocal seen
        seen += 1
        if seen == boundary and int(os.environ.get("RANK", 0)) == rank:
            os.kill(os.getpid(), number)
        return decide(self, progress, written)

    SaveTrigger.decide = be_signalled_and_decide
    return main(argv)


def interrupted(argv, folder, boundary, ranks=1, **how):
    run = run_forked(lambda: end_at(argv, boundary, **how), (), folder, ranks=ranks)
    assert run.codes == [75] * ranks, run
    assert run.output[0].count("a signal asked this run to end: it is saved in") == 1, run
    assert not any("asked this run" in output for output in run.output[1:])
    return run


def tensors_of(value, name=""):
    """Nested dicts and lists as {path: tensor or plain value}."""
    if isinstance(value, dict | list | tuple):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {n: v for key, entry in entries for n, v in tensors_of(entry, f"{name}/{key}").items()}
    return {name: value}


def end_of(logs, epoch=EPOCHS):
    """Everything that a run leaves at an epoch's end: weights, optimizer, table, tau."""
    checkpoint = torch.load(checkpoints(logs) / f"epoch_{epoch}.pt", weights_only=True)
    state = checkpoints(logs) / f"epoch_{epoch}.fastclip"
    if state.exists():
        parts = [load_file(file) for file in sorted(state.glob("*.safetensors"))]
        checkpoint["table"] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        index = json.loads((state / "index.json").read_text())
        checkpoint |= {name: index[name] for name in ("tau", "step", "settings")}
    return tensors_of(checkpoint)


def assert_same_end(logs, expected, epoch=EPOCHS, ranks=1):
    """The same bits; on three ranks and more DDP sums a resumed run's first gradients in another order."""
    ended, expected = end_of(logs, epoch), end_of(expected, epoch)
    assert ended.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor | float) and ranks > 2:
            torch.testing.assert_close(ended[name], value, rtol=1e-3, atol=1e-5, msg=name)
            continue
        same = torch.equal(ended[name], value) if isinstance(value, torch.Tensor) else ended[name] == value
        assert same, name


# ------------------------------------------------------------------ a signal, and on


@pytest.mark.parametrize(
    ("loss", "ranks", "data", "number", "more"),
    [
        ("fastclip-v3", 1, "csv", signal.SIGUSR1, []),
        ("fastclip-v2", 1, "shards", signal.SIGTERM, []),
        ("clip", 1, "shards", signal.SIGUSR1, ["--workers", 2, "--save-every", "1h"]),
        ("fastclip-v3", 2, "shards", signal.SIGTERM, ["--workers", 2]),
        ("fastclip-v2", 2, "csv", signal.SIGUSR1, ["--workers", 1]),
        ("fastclip-v3", 3, "csv", signal.SIGUSR1, []),
        ("clip", 2, "csv", signal.SIGTERM, ["--save-every", "1h"]),
        ("fastclip-v3", 1, "shards", signal.SIGUSR1, ["--accum-freq", 2, "--workers", 3, "--batch-size", 3]),
        ("fastclip-v2", 1, "csv", signal.SIGUSR1, ["--accum-freq", 2, "--batch-size", 5]),  # one batch is left over
        ("fastclip-v0", 1, "shards", signal.SIGUSR1, ["--dataset-resampled", "--workers", 2]),
    ],
)
def test_ended_by_signals_and_resumed_is_undisturbed(loss, ranks, data, number, more, csv, shards, tmp_path):
    """Signals to one rank in both epochs: weights, optimizer, log u and tau in the end."""
    data = csv if data == "csv" else shards

    def argv(name, *further):
        return flags(tmp_path / name, data, *more, *further, loss=loss)

    run = run_cli(argv("whole"), tmp_path / "out", ranks=ranks)
    assert run.ok, run
    interrupted(argv("parts"), tmp_path / "out", 2, ranks, number=number, rank=ranks - 1)
    later = int(ranks > 1)  # several ranks act on a signal one step later
    done = 2 + later
    assert names(tmp_path / "parts") == [f"epoch_0_step_{done}"]
    index = mid_epoch.read_index(checkpoints(tmp_path / "parts") / f"epoch_0_step_{done}")
    left = index["num_batches"] // index["accum_freq"] - done
    # the first step after the boundaries of the steps that are left; left-over batches make the epoch's end one more
    boundary = left + 1 + bool(index["num_batches"] % index["accum_freq"])
    interrupted(argv("parts", "--resume", "latest"), tmp_path / "out", boundary, ranks, number=number)
    assert names(tmp_path / "parts") == [f"epoch_0_step_{done}", f"epoch_1_step_{1 + later}"]
    run = run_cli(argv("parts", "--resume", "latest"), tmp_path / "out", ranks=ranks)
    assert run.ok, run
    assert_same_end(tmp_path / "parts", tmp_path / "whole", ranks=ranks)


FIGURES = re.compile(r"(Train|FastCLIP) Epoch: (\d+) (.*)")
LASTING = re.compile(
    r"(?:step|tau|gamma|tau_lr|LR|Logit Scale|Contrastive_loss): \S+|\[ *\d+/\d+"
)  # no times, no means


def test_log_lines_tensorboard_and_wandb_go_on(csv, tmp_path):
    """Step numbers, learning rates, gamma, tau and values are those of an undisturbed run."""
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    more = ["--report-to", "all", "--fastclip-gamma", 0.5]
    assert run_cli(flags(tmp_path / "whole", csv, *more), tmp_path / "out", env=env).ok
    argv = flags(tmp_path / "parts", csv, *more)
    for boundary, resume in ((5, []), (13, ["--resume", "latest"])):
        run = run_forked(lambda b=boundary, r=resume: end_at([*argv, *r], b), (), tmp_path / "out", env=env)
        assert run.codes == [75], run
    assert run_cli([*argv, "--resume", "latest"], tmp_path / "out", env=env).ok
    lines, steps = {}, {}
    for name in ("whole", "parts"):
        found = FIGURES.findall((tmp_path / name / "run" / "out.log").read_text())
        lines[name] = [(kind, epoch, LASTING.findall(rest)) for kind, epoch, rest in found]
        events = EventAccumulator(str(tmp_path / name / "run" / "tensorboard")).Reload()
        steps[name] = [[(e.step, e.value) for e in events.Scalars(tag)] for tag in ("train/loss", "fastclip/tau")]
    assert len(lines["whole"]) == 2 * 2 * SAMPLES // 4 and lines["parts"] == lines["whole"]
    assert steps["parts"] == steps["whole"]


@pytest.mark.parametrize(("ranks", "boundary"), [(1, 6), (2, 5)])
def test_ended_at_the_end_of_an_epoch(ranks, boundary, csv, tmp_path):
    """After its last step: evaluation and the epoch's checkpoint follow the resume."""

    def argv(name, *more):
        return flags(tmp_path / name, csv, "--val-data", csv, *more, batch=8 // ranks)

    assert run_cli(argv("whole"), tmp_path / "out", ranks=ranks).ok
    run = interrupted(argv("parts"), tmp_path / "out", boundary, ranks, rank=ranks - 1)
    assert names(tmp_path / "parts") == ["epoch_0_step_6"]
    assert "Eval Epoch" not in run.output[0]
    run = run_cli(argv("parts", "--resume", "latest"), tmp_path / "out", ranks=ranks)
    assert run.ok and "Eval Epoch: 1" in run.output[0], run
    for epoch in (1, 2):
        assert_same_end(tmp_path / "parts", tmp_path / "whole", epoch)


def processes_of(group):
    """Processes of a group that still run."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [line for line in lines if line[0] == str(group) and not line[1].startswith("Z")]


def test_a_signal_to_the_whole_process_group(shards, tmp_path):
    """The console command as a batch system ends it: exit code 75, and no data worker is left or has ended before."""
    argv = flags(tmp_path, shards, "--workers", 2, "--epochs", 50, *INSTALLED_MODEL)
    command = [sys.executable, "-m", "open_clip_train_fastclip.main", *argv]
    log = tmp_path / "console.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        while "Train Epoch: 0 [" not in log.read_text() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()
        assert "Traceback" not in log.read_text() and "reading failed" not in log.read_text(), log.read_text()
        assert not processes_of(process.pid)
        (name,) = names(tmp_path)
        mid_epoch.read_index(checkpoints(tmp_path) / name)
    finally:
        if processes_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def test_handlers_are_taken_back(csv, tmp_path):
    def handlers_after(argv):
        before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
        code = end_at(argv, 1)
        return code if [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)] == before else 1

    run = run_forked(lambda: handlers_after(flags(tmp_path, csv)), (), tmp_path / "out")
    assert run.codes == [75], run


# ------------------------------------------------------------------ other ranks


def with_ids_noted(argv, boundary, path):
    """end_at(), with the ids of every batch that is handed out appended to a file of the rank."""
    record = DataPosition.record

    def note(self, ids, positions):
        with open(f"{path}-{os.environ.get('RANK', 0)}", "a") as file:
            file.write(" ".join(map(str, ids.tolist())) + "\n")
        record(self, ids, positions)

    DataPosition.record = note
    return end_at(argv, boundary)


@pytest.mark.parametrize("data", ["csv", "shards"])
def test_on_2_then_1_then_2_ranks_every_sample_is_seen_once(data, csv, shards, tmp_path):
    argv = flags(tmp_path, csv if data == "csv" else shards, "--epochs", 1, loss="fastclip-v2")
    parts = [(2, 1, []), (1, 4, ["--resume", "latest"]), (2, 10**6, ["--resume", "latest"])]
    for number, (ranks, boundary, more) in enumerate(parts):
        call = with_ids_noted, ([*argv, *more], boundary, tmp_path / f"ids-{number}")
        run = run_forked(*call, tmp_path / "out", ranks=ranks)
        assert run.codes == [75 if number < 2 else 0] * ranks, run
    seen = [int(word) for path in tmp_path.glob("ids-*") for word in path.read_text().split()]
    assert sorted(seen) == list(range(SAMPLES))
    assert names(tmp_path) == ["epoch_0_step_2", "epoch_0_step_8"]  # 16 samples of 48 in batches of 8, 16 more by 4
    assert "visited: 1 " in run.output[0] and "[48/48 (100%)]" in run.output[0], run
    assert "other ranks, workers or batches" in run.output[0]


# ------------------------------------------------------------------ --save-every, --keep, --save-async


def test_every_so_many_steps_and_the_newest_stay(csv, tmp_path):
    """Steps of the whole run count, also when it goes on; saving changes nothing."""
    assert run_cli(flags(tmp_path / "plain", csv), tmp_path / "out", ranks=2).ok
    argv = flags(tmp_path / "saved", csv, "--save-every", "4steps", "--keep", 2)
    run = run_cli([*argv, "--stop-epochs", 1], tmp_path / "out", ranks=2)
    assert run.ok, run
    assert names(tmp_path / "saved") == ["epoch_0_step_4"]
    run = run_cli([*argv, "--resume", "latest"], tmp_path / "out", ranks=2)
    assert run.ok, run
    assert names(tmp_path / "saved") == ["epoch_1_step_2", "epoch_1_step_6"]
    assert_same_end(tmp_path / "saved", tmp_path / "plain")
    assert not list(checkpoints(tmp_path / "plain").glob("epoch_*_step_*"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_so_much_time(ranks, csv, tmp_path):
    argv = flags(tmp_path, csv, "--save-every", "0.001s", "--keep", 9, "--epochs", 1, batch=8)
    run = run_cli(argv, tmp_path / "out", ranks=ranks)
    assert run.ok, run
    steps = range(ranks, SAMPLES // 8 // ranks + 1)  # a step later if rank 0 has to tell
    assert names(tmp_path) == [f"epoch_0_step_{step}" for step in steps]


def test_async_trains_on_and_saves_what_was(csv, tmp_path):
    """While a save is written the next ones wait; what it holds is the state at its step."""
    argv = flags(tmp_path / "sync", csv, "--save-every", "1steps", "--keep", 99, "--epochs", 1)
    assert run_cli(argv, tmp_path / "out", ranks=2).ok

    def slow_writes(argv):
        write, decide, boundaries = mid_epoch.write_part, SaveTrigger.decide, Semaphore(0)

        def counting_decide(self, progress, written):
            boundaries.release()
            return decide(self, progress, written)

        def slow_write(*part):
            for _ in range(2):
                boundaries.acquire()  # the training goes on meanwhile
            return write(*part)

        SaveTrigger.decide, mid_epoch.write_part = counting_decide, slow_write
        return main(argv)

    argv = flags(tmp_path / "async", csv, "--save-every", "1steps", "--keep", 99, "--epochs", 1, "--save-async")
    run = run_forked(slow_writes, (argv,), tmp_path / "out", ranks=2)
    assert run.ok, run
    saved = names(tmp_path / "async")
    assert saved[0] == "epoch_0_step_1" and 2 <= len(saved) < len(names(tmp_path / "sync"))
    for name in saved:
        folders = [checkpoints(tmp_path / kind) / name for kind in ("async", "sync")]
        contents = [tensors_of(torch.load(folder / "checkpoint.pt", weights_only=True)) for folder in folders]
        assert all(torch.equal(v, contents[1][n]) for n, v in contents[0].items() if isinstance(v, torch.Tensor)), name
        indexes = [mid_epoch.read_index(folder) for folder in folders]
        assert indexes[0]["files"][1:] == indexes[1]["files"][1:], "positions and generators are the same bytes"
        states = [read_state_index(folder / "state.fastclip") for folder in folders]
        assert states[0] == states[1]


def test_async_save_is_complete_before_a_signal_ends_the_run(csv, tmp_path):
    argv = flags(tmp_path, csv, "--save-every", "2steps", "--save-async", "--keep", 9, batch=8)
    interrupted(argv, tmp_path / "out", 3)
    assert names(tmp_path) == ["epoch_0_step_2", "epoch_0_step_3"]


def full_disk(argv, step, rank):
    """The command line on a rank whose disk is full from a step on."""
    begin = AsyncCheckpointer._begin

    def begin_on_a_full_disk(self, progress):
        if progress.step >= step and int(os.environ.get("RANK", 0)) == rank:
            atomic.save_file = fail
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return begin(self, progress)

    def fail(tensors, path):
        if rank:  # its own file is small
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    def is_written(self):
        """Wait for the thread, so that each save is done at the next boundary."""
        return self._running is not None and bool(wait([self._running.entries]))

    AsyncCheckpointer._begin, AsyncCheckpointer._is_written = begin_on_a_full_disk, is_written
    return main(argv)


@pytest.mark.parametrize(("rank", "more"), [(0, []), (1, []), (0, ["--save-async"]), (1, ["--save-async"])])
def test_full_disk(rank, more, csv, tmp_path):
    """One line, an exit code on every rank, the checkpoint before untouched, nothing half written."""
    argv = flags(tmp_path, csv, "--save-every", "2steps", "--epochs", 1, *more)
    run = run_forked(full_disk, (argv, 4, rank), tmp_path / "out", ranks=2)
    assert run.codes == [2, 2], run
    errors = [line for output in run.output for line in output.splitlines() if "cannot be written" in line]
    assert len(errors) == 1 and ("File too large", "No space left")[rank] in errors[0], run
    assert "Traceback" not in "".join(run.output)
    assert names(tmp_path) == ["epoch_0_step_2"]
    run = run_cli([*argv, "--resume", "latest"], tmp_path / "out", ranks=2)
    assert run.ok and "going on in epoch 0 after 2 of 6 batches" in run.output[0], run


# ------------------------------------------------------------------ which checkpoint, and damage


@pytest.fixture(scope="module")
def saved(csv, tmp_path_factory):
    """A run that was saved every two of six steps, and at the end of its first epoch."""
    logs = tmp_path_factory.mktemp("saved")
    argv = flags(logs, csv, "--save-every", "2steps", "--keep", 9, "--save-most-recent", batch=8)
    run = run_forked(lambda: end_at(argv, 6 + 4), (), logs / "out")
    assert run.codes == [75], run
    return logs


@pytest.fixture
def logs(saved, tmp_path):
    shutil.copytree(saved / "run", tmp_path / "run")
    return tmp_path


def resumed(logs, csv, *more):
    return run_cli(flags(logs, csv, "--resume", "latest", *more, batch=8), logs / "out")


@pytest.mark.parametrize("more", [[], ["--save-most-recent"]])
@pytest.mark.parametrize(
    ("removed", "found"),
    [
        ([], "epoch_1_step_4"),
        (["epoch_1_step_*"], "epoch_1.pt|epoch_latest.pt"),
        (["epoch_1_step_*", "epoch_latest.pt", "epoch_1.pt"], "epoch_0_step_6"),
        (["epoch_*.pt", "epoch_1_step_4"], "epoch_1_step_2"),
    ],
)
def test_latest_is_the_farthest(removed, found, more, logs, csv):
    for pattern in removed:
        for path in checkpoints(logs).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = retention.newest_checkpoint(checkpoints(logs))
    assert newest.name in found.split("|")
    run = resumed(logs, csv, *more)
    assert run.ok and f"Found latest resume checkpoint at {newest}" in run.output[0], run


def test_an_incomplete_one_is_named_and_passed_over(logs, csv):
    folder = checkpoints(logs)
    (folder / "epoch_1_step_4" / "index.json").unlink()
    (folder / "epoch_1_step_4").rename(folder / "epoch_1_step_4.tmp")
    run = resumed(logs, csv, "--save-every", "2steps")
    assert run.ok and "epoch_1_step_4.tmp is what an interrupted save left behind" in run.output[0], run
    assert "going on in epoch 1 after 2 of 6 batches" in run.output[0]
    assert names(logs) == ["epoch_1_step_4", "epoch_1_step_6"]


@pytest.mark.parametrize("file", ["checkpoint.pt", "rank-00000-of-00001.safetensors", "index.json", "state"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
def test_a_damaged_one_is_an_error_that_names_it_and_the_one_before(file, harm, logs, csv):
    folder = checkpoints(logs) / "epoch_1_step_4"
    path = folder / ("state.fastclip/index.json" if file == "state" else file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink() if harm == "missing" else path.write_bytes(data if harm == "flipped" else data[:-9])
    run = resumed(logs, csv)
    assert run.codes == [2], run
    (line,) = [line for line in run.output[0].splitlines() if "error:" in line]
    assert str(path) in line and "Traceback" not in run.output[0]
    if file != "state":
        assert "epoch_1_step_2 is the one before it" in line, line
    assert folder.exists()
    if file == "index.json":
        shutil.rmtree(folder)
        run = resumed(logs, csv)
        assert run.ok and "going on in epoch 1 after 2 of 6 batches" in run.output[0], run


def test_damage_is_told_by_every_rank_alike(logs, csv):
    (checkpoints(logs) / "epoch_1_step_4" / "rank-00000-of-00001.safetensors").write_bytes(b"nothing")
    run = run_cli(flags(logs, csv, "--resume", "latest"), logs / "out", ranks=2)
    assert run.codes == [2, 2], run
    assert sum(output.count("error:") for output in run.output) == 1, run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", 5], "give --seed 1"),
        (["--loss", "fastclip-v2"], "is of a fastclip-v3 run"),
        (["--loss", "clip"], "is of a fastclip-v3 run"),
        (["--model", "ViT-B-32"], "is of another model"),
    ],
)
def test_another_run_is_refused(more, message, logs, csv):
    run = resumed(logs, csv, *more)
    assert run.codes == [2] and message in run.output[0] and "Traceback" not in run.output[0], run


def test_other_data_are_refused(logs, csv, shards, tmp_path_factory):
    for data in (make_csv(tmp_path_factory.mktemp("other"), rows=SAMPLES + 1), shards):
        run = resumed(logs, data)
        assert run.codes == [2] and "was saved with other training data" in run.output[0], run


def test_clip_goes_on_inside_an_epoch_only_with_save_every(csv, tmp_path):
    argv = flags(tmp_path, csv, loss="clip")
    interrupted([*argv, "--save-every", "9steps"], tmp_path / "out", 2)
    run = run_cli([*argv, "--resume", "latest"], tmp_path / "out")
    assert run.codes == [2] and "only with --save-every: add it" in run.output[0], run


def test_a_mid_epoch_checkpoint_serves_as_a_checkpoint(logs, csv):
    """For evaluation, for its weights alone, and by the path of its checkpoint.pt."""
    folder = checkpoints(logs) / "epoch_1_step_4"
    for path in (folder, folder / "checkpoint.pt"):
        name = ["--resume", path, "--name", path.name]
        run = run_cli(flags(logs, csv, *name, batch=8), logs / "out")
        assert run.ok and "going on in epoch 1 after 4 of 6 batches" in run.output[0], run
        run = run_cli(flags(logs, csv, *name, "--name", f"fresh{path.name}", "--fastclip-fresh-state"), logs / "out")
        assert run.ok and "Start epoch 0" in run.output[0], run
    evaluation = [
        *TINY,
        "--logs",
        logs,
        "--name",
        "evaluation",
        "--val-data",
        csv,
        "--resume",
        folder / "checkpoint.pt",
    ]
    run = run_cli(evaluation, logs / "out")
    assert run.ok and "Eval Epoch: 1" in run.output[0], run
    ended = [torch.load(logs / name / "checkpoints" / "epoch_2.pt") for name in (folder.name, "checkpoint.pt")]
    assert all(torch.equal(v, ended[1]["state_dict"][n]) for n, v in ended[0]["state_dict"].items())


def test_preflight_looks_at_the_newest_checkpoint(logs, csv):
    argv = ["--", *flags(logs, csv, "--resume", "latest", "--save-every", "30min", batch=8)]
    run = run_forked(preflight.main, (argv,), logs / "out")
    assert run.ok and "epochs done: 1 of 2" in run.output[0], run
    (checkpoints(logs) / "epoch_1_step_4" / "checkpoint.pt").write_bytes(b"nothing")
    run = run_forked(preflight.main, (argv,), logs / "out")
    assert run.codes == [2] and "epoch_1_step_4" in run.output[0], run


def test_openclip_does_not_take_files_inside_for_checkpoints(logs):
    assert Path(get_latest_checkpoint(str(checkpoints(logs)), False)).parent == checkpoints(logs)


# ------------------------------------------------------------------ small parts


def write_mid_epoch(folder, *places):
    for epoch, step in places:
        layout = mid_epoch.Layout(num_batches=99, accum_freq=1, world_size=1, workers=0, batch_size=1)
        description = mid_epoch.Header(epoch, step, step, layout, 0, "clip", DataIdentity("x"))
        path = mid_epoch.mid_epoch_dir(folder, epoch, step)
        tensors = {"data": {}, "generator": {"torch": torch.zeros(1)}}
        entries = mid_epoch.write_part(mid_epoch.RankPart(0, tensors, None, {"epoch": epoch}), path, 1)
        mid_epoch.complete(path, description, None, [entries])
    return path


def test_retiring_removes_old_ones_and_nothing_else(tmp_path):
    written = write_mid_epoch(tmp_path, (0, 8), (1, 2), (1, 10), (0, 3), (1, 9))
    for name in ("epoch_1_step_3.tmp", "epoch_0.fastclip", "epoch_1_step_x", "notes"):
        (tmp_path / name).mkdir()
    retire(written, keep=2)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"epoch_1_step_10", "epoch_1_step_9", "epoch_0.fastclip", "epoch_1_step_x", "notes"}
    retire(written, keep=1)
    assert names_in(tmp_path) == ["epoch_1_step_9"]


def retire(written, keep):
    for folder in retention.prune_mid_epoch(written, keep):
        shutil.rmtree(folder)


def test_a_damaged_one_neither_counts_nor_goes(tmp_path):
    written = write_mid_epoch(tmp_path, (0, 2), (0, 3), (0, 4))
    (tmp_path / "epoch_0_step_3" / "index.json").write_text("{")
    retire(written, keep=2)
    assert set(names_in(tmp_path)) == {"epoch_0_step_2", "epoch_0_step_3", "epoch_0_step_4"}


def test_what_a_kill_left_of_a_replaced_one_goes(tmp_path):
    written = write_mid_epoch(tmp_path, (0, 2), (0, 3))
    (tmp_path / "epoch_0_step_2.old").mkdir()  # half removed: its index is gone
    retire(written, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_0_step_3"]


def names_in(folder):
    return [path.name for *_, path in retention.mid_epoch_checkpoints(folder)]


def test_killed_while_one_replaces_another_the_old_one_is_found(tmp_path):
    write_mid_epoch(tmp_path, (1, 2)).rename(tmp_path / "epoch_1_step_2.old")
    assert names_in(tmp_path) == ["epoch_1_step_2.old"]
    write_mid_epoch(tmp_path, (1, 2))
    assert names_in(tmp_path) == ["epoch_1_step_2"]


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("1000steps", Interval(steps=1000)),
        ("1step", Interval(steps=1)),
        ("30min", Interval(seconds=1800)),
        ("1.5h", Interval(seconds=5400)),
        ("45 s", Interval(seconds=45)),
    ],
)
def test_intervals(text, interval):
    assert parse_interval(text) == interval


@pytest.mark.parametrize("text", ["", "1000", "0steps", "0min", "1.5steps", "-3h", "3 days", "steps", "inf h", "1e3s"])
def test_an_interval_without_a_right_unit_is_refused(text):
    with pytest.raises(UserError, match="1000steps, 30min, 2h or 45s"):
        parse_interval(text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--save-every", "100"], "write a number with its unit"),
        (["--keep", "0"], "--keep is 0"),
        (["--save-async"], "only with --save-every"),
        (["--save-every", "5min", "--logs", "none"], "no place to save to"),
    ],
)
def test_wrong_flags(more, message, csv, tmp_path):
    run = run_cli(flags(tmp_path, csv, *more), tmp_path / "out")
    assert run.codes == [2] and message in run.output[0], run

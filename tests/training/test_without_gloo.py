"""Where gloo does not connect the ranks they ask each other over the default group, and keep all promises."""

import json
import logging
import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cli import TINY, run_cli, run_forked
from make_data import make_csv
from ranks import run_ranks

from open_clip_train_fastclip import ranks
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.training.save_trigger import SaveTrigger

SOON = timedelta(seconds=1)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=48)


def test_a_rank_that_gloo_cannot_connect_is_told_once_and_on_all():
    def group_of_rank():
        warnings = []
        logging.warning = warnings.append
        ranks.TRIAL = SOON
        if dist.get_rank() == 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
        groups = [ranks.gloo_group(timedelta(hours=1)) for _ in range(2)]
        return warnings, [group is dist.group.WORLD for group in groups]

    (told, first), (nothing, second) = run_ranks(2, group_of_rank)
    assert first == second == [True, True] and nothing == []
    assert len(told) == 1 and "rank 1" in told[0] and "nowhere0" in told[0] and "set GLOO_SOCKET_IFNAME" in told[0]
    assert "\n" not in told[0]


def test_where_gloo_connects_the_group_is_another():
    def group_of_rank():
        group = ranks.gloo_group(timedelta(minutes=1))
        return group is dist.group.WORLD, dist.get_backend(group)

    assert run_ranks(2, group_of_rank) == [(False, "gloo")] * 2


def without_gloo(argv, signalled_at=None):
    """The command line, whose rank 1 gets no group beside the default one; a signal comes to it at a boundary."""
    new_group, decide, boundaries = dist.new_group, SaveTrigger.decide, []

    def fail(*args, **kwargs):
        if dist.get_rank() == 1:
            raise RuntimeError("gloo: no way to 127.0.1.1")
        return new_group(*args, **kwargs)

    def be_signalled_and_decide(trigger, progress, written):
        boundaries.append(progress)
        if len(boundaries) == signalled_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return decide(trigger, progress, written)

    dist.new_group, SaveTrigger.decide, ranks.TRIAL = fail, be_signalled_and_decide, SOON
    return main(argv)


def flags(logs, data, *more):
    given = [*TINY, "--train-data", data, "--logs", logs, "--name", "run", "--batch-size", 4, "--save-frequency", 0]
    return list(map(str, [*given, "--epochs", 2, *more]))


def warnings_of(run):
    lines = [line for output in run.output for line in output.splitlines()]
    return [line for line in lines if "gloo does not connect the ranks (rank 1: gloo: no way to 127.0.1.1)" in line]


@pytest.mark.parametrize("more", [(), ("--workers", 1, "--save-every", "2steps", "--save-async")])
def test_a_signal_to_one_rank_saves_after_the_running_step(more, csv, tmp_path):
    argv = flags(tmp_path, csv, "--loss", "fastclip-v3", *more)
    run = run_forked(lambda: without_gloo(argv, signalled_at=3), (), tmp_path / "out", ranks=2)
    assert run.codes == [75, 75] and len(warnings_of(run)) == 1, run
    newest = tmp_path / "run" / "checkpoints" / "epoch_0_step_4"
    assert json.loads((newest / "index.json").read_text())["step"] == 4
    resumed = run_cli([*argv, "--resume", "latest"], tmp_path / "out", ranks=2)
    assert resumed.ok and "going on in epoch 0 after 4 of 6 batches" in resumed.output[0], resumed
    assert not warnings_of(resumed)


@pytest.mark.parametrize(("loss", "workers"), [("clip", 0), ("fastclip-v3", 1)])
def test_what_one_rank_finds_wrong_in_its_data_ends_all(loss, workers, tmp_path):
    data = make_csv(tmp_path, rows=32)
    (tmp_path / "31.png").write_bytes(b"x")
    argv = flags(tmp_path / "logs", data, "--loss", loss, "--workers", workers)
    run = run_forked(lambda: without_gloo(argv), (), tmp_path / "out", ranks=2, timeout=60)
    lines = [line for output in run.output for line in output.splitlines() if "fastclip: error" in line]
    assert run.codes == [2, 2] and len(lines) == 1 and "row 32 of " in lines[0], run
    assert len(warnings_of(run)) == 1


def test_an_evaluation(csv, tmp_path):
    argv = flags(tmp_path, csv, "--loss", "clip", "--val-data", csv)
    run = run_forked(lambda: without_gloo(argv), (), tmp_path / "out", ranks=2)
    assert run.ok and len(warnings_of(run)) == 1, run
    results = (tmp_path / "run" / "checkpoints" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in results] == [1, 2]


def test_over_nccl_the_host_waits_for_the_copied_answers_alone(monkeypatch):
    """By fakes of a GPU: asking waits for nothing, reading for what was recorded behind the answers' copy."""
    events, to = [], torch.Tensor.to

    class Event:
        def __init__(self, blocking=False):
            events.append(("made", blocking))

        def record(self, stream):
            events.append("recorded")

        def synchronize(self):
            events.append("synchronized")

    class Work:
        def wait(self):
            events.append("stream waits")

    def move(tensor, device, non_blocking=False):
        events.append((str(device), non_blocking))
        return to(tensor, "cpu", copy=True)

    def all_reduce(values, op, group, async_op):
        events.append("asked")
        values += torch.tensor([0, 1], dtype=torch.uint8)
        return Work()

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    monkeypatch.setattr("torch.Tensor.is_cuda", True)
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda self: self)
    monkeypatch.setattr("torch.Tensor.to", move)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    question = ranks.Question([1, 0], None)
    asked = [("cuda", True), "asked", "stream waits", ("cpu", True), ("made", True), "recorded"]
    assert events == asked
    assert question.answers() == [1, 1] and events == [*asked, "synchronized"]

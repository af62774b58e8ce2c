"""--profile and benchmarks/step_time.py: where a step's time goes, in traces whose answer is known by hand."""

import gzip
import json
import os
import signal
import time

import pytest
import torch
from cli import TINY, run_forked

from benchmarks import step_time
from benchmarks.harness.trace_times import step_times
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.training.profiling import FOLDER
from open_clip_train_fastclip.training.save_trigger import SaveTrigger

TRAINING, GLOO = 1, 2  # threads


def event(cat, name, begin, end, tid=TRAINING):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid}


def step(number, begin, end):
    return event("user_annotation", f"ProfilerStep#{number}", begin, end)


def op(name, begin, end):
    return event("cpu_op", name, begin, end)


def mark(name, begin, end):
    return event("user_annotation", name, begin, end)


def transfer(name, begin, end):
    return event("user_annotation", f"gloo:{name}", begin, end, GLOO)


# Two steps of 100 us. Computation: 0-5, 10-70 on two streams, 110-160 with a copy. Communication: 50-90, 155-190 and
# 195-200.
CUDA = [
    step(12, 0, 100),
    step(13, 100, 200),
    op("aten::mm", 0, 190),
    event("kernel", "ampere_sgemm", -20, 5, tid=7),
    event("kernel", "ampere_sgemm", 10, 60, tid=7),
    event("kernel", "elementwise", 40, 70, tid=8),
    event("kernel", "ampere_sgemm", 110, 150, tid=7),
    event("gpu_memcpy", "Memcpy HtoD", 150, 160, tid=8),
    event("kernel", "ncclDevKernel_AllGather_RING_LL", 50, 90, tid=20),
    event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 155, 190, tid=20),
    event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 195, 230, tid=20),
    event("gpu_user_annotation", "nccl:all_reduce", 0, 200, tid=20),
]

CPU = [
    step(12, 0, 2000),
    mark("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 100),
    mark("Optimizer.zero_grad#AdamW.zero_grad", 120, 130),
    mark("DistributedDataParallel.forward", 140, 500),
    op("aten::linear", 150, 300),
    op("aten::addmm", 150, 300),
    transfer("broadcast", 295, 315),  # beside the model; the pause of 10 us is none of the training thread's waits
    op("aten::relu", 310, 490),
    mark("loss", 500, 900),
    op("aten::mm", 510, 600),
    op("c10d::_allgather_base_", 600, 620),
    transfer("all_gather", 610, 800),
    op("aten::mm", 800, 890),
    op("autograd::engine::evaluate_function: MmBackward0", 950, 1100),
    op("aten::mm", 955, 1095),
    op("autograd::engine::evaluate_function: AddmmBackward0", 1105, 1200),
    op("aten::mm", 1110, 1195),
    op("c10d::allreduce_", 1196, 1199),
    transfer("all_reduce", 1190, 1500),
    op("torch.distributed.ddp.reducer::copy_bucket_to_grad", 1520, 1550),
    op("aten::copy_", 1525, 1545),
    mark("Optimizer.step#AdamW.step", 1600, 1900),
    op("aten::addcdiv_", 1700, 1710),
]


def test_a_cuda_trace_with_a_known_answer():
    assert step_times(CUDA) == {
        "kind": "cuda",
        "steps": 2,
        "total": 0.1,
        "computation": 0.0575,
        "pure_communication": 0.0275,
        "overlapped": 0.0125,
        "others": 0.015,
    }


def test_a_cpu_trace_with_a_known_answer():
    assert step_times(CPU) == {
        "kind": "cpu",
        "steps": 1,
        "total": 2.0,
        "forward": 0.37,  # 130 to 500
        "loss": 0.21,  # 500 to 900 without the wait from 610 to 800
        "backward": 0.295,  # 950 to 1550 without the wait from 1195 to 1500
        "optimizer": 0.31,
        "data": 0.1,
        "waiting": 0.495,
        "others": 0.22,
        "collectives": 0.52,  # 20 and 5 of it beside other work
    }


def test_accumulated_batches_have_a_forward_pass_each():
    backward = "autograd::engine::evaluate_function: MmBackward0"
    times = step_times(
        [
            step(12, 0, 1000),
            mark("enumerate(DataLoader)#it", 0, 10),
            mark("Optimizer.zero_grad#AdamW.zero_grad", 10, 20),  # 80 of forward without gradient
            mark("enumerate(DataLoader)#it", 100, 110),
            mark("Optimizer.zero_grad#AdamW.zero_grad", 110, 120),  # 80 again
            mark("Optimizer.zero_grad#AdamW.zero_grad", 200, 210),  # 90
            mark("loss", 300, 400),
            op(backward, 400, 500),  # 100
            mark("loss", 600, 700),
            op(backward, 700, 800),
            mark("Optimizer.step#AdamW.step", 850, 900),
        ]
    )
    assert times["forward"] == 0.35 and times["loss"] == 0.2 and times["backward"] == 0.2 and times["others"] == 0.15


def write(run, events, rank=0):
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    with gzip.open(run / FOLDER / f"rank-{rank:05d}.json.gz", "wt") as file:
        json.dump({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}, file)


def test_a_row_a_rank_is_shown_and_kept(tmp_path, capsys):
    run = tmp_path / "run"
    write(run, CUDA, rank=0)
    write(run, CUDA, rank=10)
    (run / "params.txt").write_text("loss: fastclip-v3\nbatch_size: 128\nmodel: RN50\n")
    assert step_time.main([str(run), "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "pure_communication" in lines[1] and lines[3].split() == ["10", "0.10", "0.06", "0.03", "0.01", "0.01"]
    kept = [json.loads(line) for line in (tmp_path / "step_time.jsonl").read_text().splitlines()]
    assert [(row["rank"], row["algorithm"], row["batch_size"]) for row in kept] == [
        (r, "fastclip-v3", "128") for r in (0, 10)
    ]
    assert json.loads(lines[-1])["rows"][1]["overlapped"] == 0.0125


@pytest.mark.parametrize("broken", ["none", "cut", "no steps"])
def test_missing_and_broken_traces_are_named(broken, tmp_path, capsys):
    if broken != "none":
        write(tmp_path, [] if broken == "no steps" else CPU)
    if broken == "cut":
        path = tmp_path / FOLDER / "rank-00000.json.gz"
        path.write_bytes(path.read_bytes()[:200])
    assert step_time.main([str(tmp_path), "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "train with --profile" in error and error.count("\n") == 1
    assert not (tmp_path / "step_time.jsonl").exists()


def train(folder, *flags, steps, ranks, function=main):
    """Train `steps` steps of 8 samples a rank; function: what to call with the command line."""
    samples = str(8 * ranks * steps)
    data = ["--dataset-type", "synthetic", "--train-num-samples", samples, "--save-frequency", "0"]
    arguments = [str(argument) for argument in [*TINY, *data, "--logs", folder, *flags]]
    return run_forked(function, (arguments,), folder / "output", ranks=ranks)


@pytest.mark.parametrize("flags", [["--loss", "fastclip-v3"], ["--loss", "clip", "--local-loss", "--gather-with-grad"]])
def test_a_real_run_of_two_ranks(flags, tmp_path, capsys):
    run = train(tmp_path, *flags, "--profile", "--name", "run", steps=23, ranks=2)
    assert run.ok, run
    assert step_time.main([str(tmp_path / "run"), "--results", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["rank"], row["kind"], row["steps"], row["algorithm"]) for row in rows] == [
        (rank, "cpu", 10, flags[1]) for rank in (0, 1)
    ]
    for row in rows:
        phases = [row[name] for name in ("forward", "loss", "backward", "optimizer", "data")]
        assert all(time > 0 for time in phases) and row["others"] >= 0
        assert sum(phases) + row["waiting"] + row["others"] == pytest.approx(row["total"], abs=0.01)
        assert 0 < row["waiting"] <= row["collectives"] < row["total"]


@pytest.mark.parametrize(
    ("flags", "batches", "warning"),
    [
        (["--name", "short"], 21, "traces steps 13 to 22 of an epoch, and those of short have 21: no trace is written"),
        (["--name", "short", "--accum-freq", "2"], 43, "and those of short have 21: no trace is written"),
        (["--logs", "none"], 22, "--logs none keeps none: no trace is written"),
    ],
)
def test_a_run_that_leaves_no_trace_says_so(flags, batches, warning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # OpenCLIP makes a folder none/ for --logs none
    run = train(tmp_path, "--loss", "clip", "--profile", *flags, steps=batches, ranks=1)
    assert run.ok and warning in run.output[0], run
    assert not list(tmp_path.rglob("rank-*"))


def test_a_run_that_ends_within_the_traced_steps_leaves_no_trace(tmp_path):
    def stopped_in_step_15(argv):
        ask, asked = SaveTrigger.ask, []

        def ask_and_stop(moments, written):
            asked.append(moments)
            if len(asked) == 15:
                os.kill(os.getpid(), signal.SIGTERM)
            ask(moments, written)

        SaveTrigger.ask = ask_and_stop
        return main(argv)

    flags = ["--loss", "fastclip-v3", "--profile", "--name", "run"]
    run = train(tmp_path, *flags, steps=23, ranks=1, function=stopped_in_step_15)
    assert run.codes == [75] and "steps are traced" not in run.output[0], run
    assert not (tmp_path / "run" / FOLDER).exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER).touch()  # in the way of the folder
    run = train(tmp_path, "--loss", "clip", "--profile", "--name", "run", steps=23, ranks=1)
    assert run.ok and "rank-00000.json.gz cannot be written" in run.output[0], run


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_profiling_changes_no_parameter(loss, tmp_path):
    for name, flags in (("plain", []), ("profiled", ["--profile"])):
        run = train(tmp_path, "--loss", loss, "--name", name, "--save-frequency", "1", *flags, steps=23, ranks=1)
        assert run.ok, run
    plain, profiled = (torch.load(tmp_path / name / "checkpoints" / "epoch_1.pt") for name in ("plain", "profiled"))
    assert list((tmp_path / "profiled" / FOLDER).iterdir()) and not (tmp_path / "plain" / FOLDER).exists()
    for name, values in plain["state_dict"].items():
        assert torch.equal(values, profiled["state_dict"][name]), name


def test_no_collective_outlives_its_trace(tmp_path):
    """Else its gloo thread writes into memory that the stopped profiler has freed."""

    def answer_late(argv):
        ask, stop, asked = SaveTrigger.ask, torch.profiler.profile.stop_trace, []

        def slow_ask(moments, written):
            asked.append(moments)
            if os.environ["RANK"] == "1" and len(asked) == 22:
                time.sleep(1)
            ask(moments, written)

        def checked_stop(profiler):
            print("asked", len(asked), "answered", asked[-1]._question._work.is_completed())
            stop(profiler)

        SaveTrigger.ask, torch.profiler.profile.stop_trace = slow_ask, checked_stop
        return main(argv)

    flags = ["--loss", "fastclip-v3", "--profile", "--name", "run"]
    run = train(tmp_path, *flags, steps=23, ranks=2, function=answer_late)
    assert run.ok and all("asked 22 answered True" in output for output in run.output), run


def test_a_trace_of_accumulated_steps_covers_every_batch(tmp_path):
    run = train(tmp_path, "--loss", "fastclip-v1", "--profile", "--accum-freq", "2", "--name", "run", steps=46, ranks=1)
    assert run.ok, run
    with gzip.open(tmp_path / "run" / FOLDER / "rank-00000.json.gz", "rt") as file:
        names = [entry["name"] for entry in json.load(file)["traceEvents"] if entry.get("ph") == "X"]
    assert names.count("loss") == 20 and sum(name.startswith("ProfilerStep#") for name in names) == 10

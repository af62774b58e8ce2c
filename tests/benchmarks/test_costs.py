"""The benchmarks at very small sizes: their rows, their counts, and the targets that are not timings."""

import json
import os

import pytest
import torch

from benchmarks import checkpoint_cost, communication, loss_cost, step_cost
from benchmarks.harness import network
from benchmarks.harness.one_rank import FLOOR, OPEN_CLIP, Case
from benchmarks.harness.processes import in_processes
from open_clip_train_fastclip.loss.config import LOSSES


def run(benchmark, arguments, folder, capsys):
    """Rows that a benchmark's last line holds, after checking that the same were appended to its file."""
    name = benchmark.__name__.rsplit(".", 1)[1]
    assert benchmark.main([*map(str, arguments), "--results", str(folder)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    kept = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert [{key: of_file[key] for key in row} for of_file, row in zip(kept, rows, strict=True)] == rows
    for row in kept:
        assert row["command"].startswith(f"python -m benchmarks.{name}") and row["date"]
        assert row["versions"]["torch"] == torch.__version__.split("+")[0] and row["machine"]["cpu"]
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bf16", "amp_bf16"])
def test_loss_cost_has_a_row_for_every_loss(dtype, tmp_path, capsys):
    rows = run(loss_cost, ["8x32x16", "8x8x16", "--seconds", 0, "--dtype", dtype], tmp_path, capsys)
    assert [(row["case"], row["loss"]) for row in rows] == [
        (case, loss) for case in ("8x32x16", "8x8x16") for loss in (OPEN_CLIP, FLOOR, *LOSSES)
    ]
    for row in rows:
        assert (row["device"], row["threads"], row["dtype"]) == ("cpu", 1, dtype)
        assert row["median_ms"] > 0 and row["ratio_to_four_matmuls"] > 0 and row["rounds"] >= loss_cost.LEAST_ROUNDS
        if row["loss"] == OPEN_CLIP:
            assert row["speedup_over_open_clip"] == 1


@pytest.mark.parametrize("loss", ["fastclip-v3", "fastclip-v2"])
def test_a_large_global_batch_takes_a_tenth_of_open_clips_memory(loss):
    peaks = [
        in_processes(1, loss_cost.extra_bytes, name, Case(1024, 16384, 8), "cpu", "float32")[0]
        for name in (OPEN_CLIP, loss)
    ]
    assert peaks[1] <= 0.1 * peaks[0], peaks


@pytest.fixture(scope="module")
def counts():
    return in_processes(4, communication.count_all, [(128, 512)], torch.float32)[0]


def test_open_clips_bytes_are_those_of_nccl(counts):
    features = 128 * 512 * 4
    assert counts[OPEN_CLIP, 128, 512][0] == {
        "all-gather": [2, 2 * features, 8 * features],
        "reduce-scatter": [2, 8 * features, 2 * features],
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_sends_what_it_must_and_no_more(loss, counts):
    b, d, ranks = 128, 512, 4
    columns = 8 if loss in ("fastclip-v2", "isogclr") else 2
    slope = loss in ("fastclip-v0", "fastclip-v3")  # a sum over a rank's anchors, for the gradient of one learned tau
    collectives, sample_bytes = counts[loss, b, d]
    assert collectives == {
        "ids": [1, 8 * b, ranks * 8 * b],
        "table rows": [1, 4 * columns * ranks * b, 4 * columns * ranks * b],
        "features": [1, 8 * b * d, ranks * 8 * b * d],
        "new values": [1, 4 * (b * (columns + 1) + slope), ranks * 4 * (b * (columns + 1) + slope)],
    }
    assert sample_bytes == 4 * columns


def test_a_step_costs_little_more_than_half_of_open_clips_bytes(counts):
    for row in communication.counted_rows(counts, 128, 512, 4, "float32")[1:]:
        assert row["calls"] <= 4
        assert row["wire_share_of_open_clip"] <= 0.55, row
        beyond_table = sum(c["given"] for c in row["collectives"] if c["purpose"] != "table rows")
        assert beyond_table < (532_480 if row["loss"] in ("fastclip-v2", "isogclr") else 527_360)


def test_communication_projects_to_many_gpus(tmp_path, capsys):
    rows = run(communication, ["--ranks", 2, "--batch", 4, "--width", 8], tmp_path, capsys)
    kinds = [row["kind"] for row in rows]
    assert kinds.count("counted") == 1 + len(LOSSES)
    projected = [row for row in rows if row["kind"] == "projected"]
    assert len(projected) == len(network.SETTINGS) * len(network.INTERCONNECTS) * len(network.GPUS)
    assert all(0 < row["fastclip-v3_waited_ms"] < row["open-clip_ms"] for row in projected)
    (laion,) = (row for row in rows if row.get("data") == "LAION400M" and row["loss"] == "fastclip-v3")
    assert laion["bytes_a_gpu"]["8"] == 8 * 51_760_000 and laion["released_bytes_a_process"] == 8 * 414_080_000


@pytest.mark.parametrize("benchmark, arguments", [(loss_cost, []), (step_cost, ["--ranks", "3"])])
def test_gpus_that_are_not_there_are_refused_in_one_line(benchmark, arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--device", "cuda", *arguments])
    assert "torch finds" in capsys.readouterr().err.splitlines()[-1]


def test_a_question_for_gpus_begins_no_cuda():
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"  # forks could not use what it begins


def test_step_cost_runs_the_ordinary_loop(tmp_path, capsys):
    losses = ["fastclip-v2", "fastclip-v3"]
    sizes = ["--rounds", 2, "--steps", 2, "--table-samples", 10_000]
    rows = run(step_cost, ["ViT-Glyph-32:4", "--losses", *losses, *sizes], tmp_path, capsys)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [(row["ranks"], row["loss"]) for row in steps] == [
        (ranks, loss) for ranks in (1, 2) for loss in ("clip", *losses)
    ]
    assert all(row["samples_per_second"] > 0 and row["samples_ratio_to_clip"] > 0 for row in steps)
    assert {(row["device"], row["precision"]) for row in steps} == {("cpu", "fp32")}
    (table,) = (row for row in rows if row["kind"] == "table")
    assert table["table_bytes_a_rank"] == 5001 * 8  # and one spare row
    assert table["disk_bytes"] >= 80_000
    assert set(table["seconds"]) == {"set_up", "read_a_step", "write_a_step", "save", "load"}


def test_checkpoint_cost_saves_and_resumes(tmp_path, capsys):
    rows = run(checkpoint_cost, ["--samples", 1000, "--saves", 1], tmp_path, capsys)
    assert [row["mode"] for row in rows] == ["synchronous", "background"]
    assert all(row["pause_ms"] >= row["copy_ms"] > 0 and row["first_step_resumed_s"] > 0 for row in rows)

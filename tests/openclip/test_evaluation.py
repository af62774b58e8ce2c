"""An evaluation that fails costs no trained epoch, and is told by the log and by the exit code."""

import json

import pytest
import torch
from cli import TINY, run_cli
from make_data import image_of, make_csv, make_shards, sample_files, write_tar


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=16)


def missing_image(folder):
    path = make_csv(folder, rows=9)
    (folder / "7.png").unlink()
    return ["--val-data", path]


def broken_image(folder):
    path = make_csv(folder, rows=9)
    (folder / "0.png").write_bytes(b"no png")
    return ["--val-data", path, "--workers", 1]


def unreadable_class(folder):
    for number in range(1000):
        (folder / f"n{number:08d}").mkdir()
        image_of(number).save(folder / f"n{number:08d}" / "a.png")
    (folder / "n00000003" / "a.png").write_bytes(b"no png")
    return ["--imagenet-val", folder, "--zeroshot-frequency", 1]


@pytest.mark.parametrize(
    ("fault", "loss", "ranks"),
    [
        (missing_image, "fastclip-v3", 1),
        (missing_image, "fastclip-v2", 2),
        (missing_image, "clip", 2),
        (broken_image, "clip", 1),
        (unreadable_class, "fastclip-v3", 2),
    ],
)
def test_a_failed_evaluation_costs_no_epoch(fault, loss, ranks, csv, tmp_path):
    (tmp_path / "val").mkdir()
    epochs = 2 if fault is missing_image else 1  # the others take seconds: a thousand classes, a worker that has failed
    argv = [*TINY, "--loss", loss, "--train-data", csv, "--logs", tmp_path / "logs", "--name", "run"]
    run = run_cli([*argv, "--epochs", epochs, *fault(tmp_path / "val")], tmp_path / "out", ranks=ranks)
    assert run.codes == [2] * ranks and "Traceback" not in str(run), run
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    failures = [line for line in log.splitlines() if "| ERROR |" in line]
    assert len(failures) == epochs and all("the evaluation failed" in line for line in failures), failures
    assert ("7.png" if fault is missing_image else "UnidentifiedImageError") in failures[0]
    (line,) = [line for output in run.output for line in output.splitlines() if "train-fastclip: error" in line]
    assert "the training is complete and saved" in line
    for epoch in range(1, epochs + 1):
        assert torch.load(tmp_path / "logs" / "run" / "checkpoints" / f"epoch_{epoch}.pt")["epoch"] == epoch


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_alone_that_fails(ranks, csv, tmp_path):
    argv = [*TINY, "--logs", tmp_path / "logs", "--name", "run"]
    assert run_cli([*argv, "--train-data", csv], tmp_path / "out").ok
    (tmp_path / "val").mkdir()
    checkpoint = tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt"
    argv = [*TINY, "--logs", tmp_path / "logs", "--name", "evaluation", "--resume", checkpoint]
    run = run_cli([*argv, *missing_image(tmp_path / "val")], tmp_path / "out", ranks=ranks)
    assert run.codes == [2] * ranks and "Traceback" not in str(run), run
    (line,) = [line for output in run.output for line in output.splitlines() if "train-fastclip: error" in line]
    assert "7.png" in line and "training" not in line.split("train-fastclip: error")[1]


def test_evaluation_shards_of_which_a_sample_is_broken_are_evaluated(csv, tmp_path):
    """Stock skips such a sample with a warning."""
    data = make_shards(tmp_path / "val", shards=1, per_shard=9)
    files = [file for number in range(8) for file in sample_files(number, f"{number:03d}")]
    write_tar(data.replace("{00000..00000}", "00000"), [*files, ("999.png", b"no png"), ("999.txt", b"text")])
    argv = [*TINY, "--train-data", csv, "--val-data", tmp_path / "val" / "00000.tar", "--val-num-samples", 9]
    run = run_cli([*argv, "--logs", tmp_path / "logs", "--name", "run"], tmp_path / "out")
    assert run.ok, run
    (line,) = (tmp_path / "logs" / "run" / "checkpoints" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["epoch"] == 1

"""What wrong input gets: one line that says what, where and what to do; exit code not 0 on every rank; no traceback."""

import json
import shutil
from pathlib import Path

import open_clip_train.main
import pytest
import torch
from cli import MODEL, TINY, run_cli, run_forked
from make_data import make_csv, make_shards

from open_clip_train_fastclip import preflight
from open_clip_train_fastclip.main import main


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=32)


@pytest.fixture
def shards(tmp_path):
    make_shards(tmp_path / "data", shards=4, per_shard=8)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def finished_run(csv, tmp_path_factory):
    """Logs with one finished run 'run' of fastclip-v3 on one rank."""
    logs = tmp_path_factory.mktemp("logs")
    run = run_cli([*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--logs", logs, "--name", "run"], logs / "out")
    assert run.ok, run
    return logs


def snapshot(folder):
    """Every file below `folder` with its bytes, but for the captured output of the tests' own runs."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent != folder / "out")
    return {path: path.read_bytes() for path in files}


def refused(run, *words, ranks=1):
    """Every rank ended with a code that is not 0; the complaint is one line with these words; no traceback."""
    assert all(code > 0 for code in run.codes), run
    assert not any("Traceback" in output for output in run.output), run
    complaints = [line for output in run.output for line in output.splitlines() if "error" in line.lower()]
    assert len(complaints) == 1, run
    for word in words:
        assert word in complaints[0], run


def v3(train_data, logs, *extra):
    return [*TINY, "--loss", "fastclip-v3", "--train-data", train_data, "--logs", logs, "--name", "new", *extra]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss", "fastclip-v4"], ["--loss", "fastclip-v4", "fastclip-v3"]),
        (["--loss", "fastclip-v3", "--fastclip-gama", "0.2"], ["--fastclip-gama"]),
        (["--loss", "fastclip-v3"], ["--train-data"]),
        (
            [
                "--loss",
                "fastclip-v3",
                "--dataset-type",
                "synthetic",
                "--train-num-samples",
                "8",
                "--fastclip-gamma",
                "0",
            ],
            ["gamma", "(0, 1]"],
        ),
        (["--model", "ViT-Glyf-32", "--dataset-type", "synthetic", "--train-num-samples", "8"], ["ViT-Glyph-32"]),
    ],
    ids=["unknown loss", "misspelt flag", "no training data", "gamma out of range", "unknown model"],
)
def test_flags(flags, words, tmp_path):
    refused(run_cli([*TINY, *flags, "--logs", tmp_path / "logs"], tmp_path / "out"), *words)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_that_is_not_there(ranks, tmp_path):
    run = run_cli(v3(tmp_path / "{00000..00003}.tar", tmp_path / "logs"), tmp_path / "out", ranks=ranks)
    refused(run, "00000.tar", ranks=ranks)
    run = run_cli(v3(tmp_path / "no.csv", tmp_path / "logs"), tmp_path / "out", ranks=ranks)
    refused(run, "no.csv", ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("damage", ["no tar", "cut in half"])
def test_damaged_shard(damage, ranks, shards, tmp_path):
    shard = shards / "00002.tar"
    content = shard.read_bytes()
    shard.write_bytes(b"not a tar at all" * 100 if damage == "no tar" else content[: len(content) // 2])
    run = run_cli(v3(f"{shards}/{{00000..00003}}.tar", tmp_path / "logs"), tmp_path / "out", ranks=ranks)
    refused(run, "00002.tar", ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_csv_without_the_columns(ranks, csv, tmp_path):
    run = run_cli(v3(csv, tmp_path, "--csv-img-key", "picture"), tmp_path / "out", ranks=ranks)
    refused(run, "picture", "filepath", ranks=ranks)


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "data.csv.gz").write_bytes(b"filepath\ttitle\n")
    flags = v3(tmp_path / "data.csv.gz", tmp_path, "--dataset-type", "csv")
    refused(run_cli(flags, tmp_path / "out"), "data.csv.gz is no table")


def test_a_path_that_pandas_completes(csv, tmp_path):
    """It knows ~ and addresses, which are no files for us."""
    run = run_cli(v3("~/" + Path(csv).name, tmp_path), tmp_path / "out", env={"HOME": str(Path(csv).parent)})
    assert run.ok, run


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_batch_of_one(loss, csv, tmp_path):
    refused(run_cli([*v3(csv, tmp_path, "--batch-size", 1), "--loss", loss], tmp_path / "out"), "--batch-size")


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_an_epoch_without_a_step(loss, csv, tmp_path):
    for flags in (["--batch-size", 33], ["--accum-freq", 5]):
        run = run_cli([*v3(csv, tmp_path, *flags, "--name", flags[0][2:]), "--loss", loss], tmp_path / "out", ranks=2)
        refused(run, "--batch-size", "--accum-freq")
    empty = tmp_path / "empty.csv"
    empty.write_text("filepath\ttitle\n")
    refused(run_cli([*v3(empty, tmp_path), "--loss", loss], tmp_path / "out"), "empty.csv", "no rows")


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_evaluation_data_that_is_not_there(loss, csv, tmp_path):
    for flag, path in (("--val-data", tmp_path / "{0..3}.tar"), ("--imagenet-val", tmp_path / "imagenet")):
        run = run_cli([*v3(csv, tmp_path / flag[2:], flag, path), "--loss", loss], tmp_path / "out", ranks=2)
        refused(run, str(path)[:-12])


@pytest.mark.parametrize(("workers", "ranks", "fitting"), [(5, 1, 4), (3, 2, 2)])
def test_too_few_shards_for_the_workers(workers, ranks, fitting, shards, tmp_path):
    flags = v3(f"{shards}/{{00000..00003}}.tar", tmp_path, "--workers", workers)
    refused(run_cli(flags, tmp_path / "out", ranks=ranks), f"--workers {fitting}", ranks=ranks)


def test_a_shard_with_more_samples_than_its_size_says(shards, tmp_path):
    sizes = {f"0000{i}.tar": 8 for i in range(4)} | {"00001.tar": 5}
    (shards / "sizes.json").write_text(json.dumps(sizes))
    pattern = f"{shards}/{{00000..00003}}.tar"
    for workers in (0, 2):
        run = run_cli(v3(pattern, tmp_path / f"logs{workers}", "--workers", workers), tmp_path / "out")
        refused(run, "00001.tar", "sizes.json")
    # only the rank that reads this shard can tell; the other one ends as well
    run = run_cli(v3(pattern, tmp_path / "logs-ranks"), tmp_path / "out", ranks=2)
    refused(run, "00001.tar", "sizes.json", ranks=2)
    assert run.codes == [2, 2]


@pytest.mark.parametrize(
    ("model", "message"), [("coca_ViT-B-32", "is a CoCa model"), ("ViT-B-16-SigLIP", "has a logit_bias")]
)
def test_models_that_the_losses_do_not_train(model, message, csv, tmp_path):
    flags = ["--loss", "fastclip-v3", "--train-data", csv, "--model", model, "--device", "cpu", "--logs", tmp_path]
    run = run_forked(preflight.main, (["--", *map(str, flags)],), tmp_path)
    assert run.codes == [2] and message in run.output[0] and "Traceback" not in run.output[0], run


def test_a_model_without_logit_scale(csv, tmp_path):
    def without_logit_scale(argv):
        create = open_clip_train.main.create_model_and_transforms

        def create_model_and_transforms(model_name, *args, **kwargs):
            model, *transforms = create(model_name, *args, **kwargs)
            del model.logit_scale
            return model, *transforms

        open_clip_train.main.create_model_and_transforms = create_model_and_transforms
        return main(argv)

    flags = [str(flag) for flag in v3(csv, tmp_path)]
    run = run_forked(without_logit_scale, (flags,), tmp_path / "out", ranks=2)
    refused(run, "logit_scale", MODEL)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_of_nothing(ranks, csv, tmp_path):
    run = run_cli(v3(csv, tmp_path, "--resume", tmp_path / "epoch_9.pt"), tmp_path / "out", ranks=ranks)
    refused(run, "epoch_9.pt", ranks=ranks)
    assert not list(tmp_path.glob("**/out.log")), "the name is free for the corrected command"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["truncated", "foreign", "other model"])
def test_resume_of_a_bad_file(kind, ranks, csv, finished_run, tmp_path):
    path = tmp_path / "epoch_1.pt"
    whole = (finished_run / "run" / "checkpoints" / "epoch_1.pt").read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "foreign":
        torch.save([1, 2, 3], path)
    else:
        torch.save({"epoch": 1, "state_dict": {"w": torch.zeros(3)}}, path)
    refused(run_cli(v3(csv, tmp_path, "--resume", path), tmp_path / "out", ranks=ranks), "epoch_1.pt", ranks=ranks)


@pytest.mark.parametrize("flags", [["--lock-image"], ["--loss", "clip", "--freeze-temperature"]])
def test_resume_with_an_optimizer_of_other_parameters(flags, csv, finished_run, tmp_path):
    path = finished_run / "run" / "checkpoints" / "epoch_1.pt"
    if "clip" in flags:
        assert run_cli([*TINY, "--train-data", csv, "--logs", tmp_path, "--name", "clip"], tmp_path / "out").ok
        path = tmp_path / "clip" / "checkpoints" / "epoch_1.pt"
    run = run_cli(v3(csv, tmp_path, "--resume", path, *flags), tmp_path / "out", ranks=2)
    assert run.codes == [2, 2] and "Traceback" not in str(run) and "--fastclip-fresh-state" in run.output[0], run


def test_a_name_that_exists_without_logs(csv, tmp_path, monkeypatch):
    """OpenCLIP writes a log even with --logs none, and gives up on rank 0 alone if it is there."""
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--logs", "none", "--name", "run"]
    assert run_cli(flags, tmp_path / "out", ranks=2).ok
    refused(run_cli(flags, tmp_path / "out", ranks=2, timeout=60), "--name")


def test_openclip_giving_up_ends_every_rank(csv, tmp_path):
    """A remote sync that fails is noticed by rank 0 alone; the others end when it is gone."""
    flags = [*v3(csv, tmp_path), "--remote-sync", "/proc/nowhere", "--remote-sync-protocol", "fsspec"]
    run = run_cli([*flags, "--dist-timeout", 20], tmp_path / "out", ranks=2, timeout=60)
    assert all(code > 0 for code in run.codes), run


def test_state_of_another_algorithm_or_data_set(csv, finished_run, tmp_path):
    path = finished_run / "run" / "checkpoints" / "epoch_1.pt"
    before = snapshot(finished_run)
    v1 = [flag if flag != "fastclip-v3" else "fastclip-v1" for flag in v3(csv, tmp_path, "--resume", path)]
    refused(run_cli(v1, tmp_path / "out"), "fastclip-v3", "fastclip-v1", "--fastclip-fresh-state")
    (tmp_path / "other").mkdir()
    other = make_csv(tmp_path / "other", rows=24)
    refused(run_cli(v3(other, tmp_path, "--name", "b", "--resume", path), tmp_path / "out"), "32", "24")
    header, *rows = Path(csv).read_text().splitlines()
    same_size = tmp_path / "other.csv"
    same_size.write_text("\n".join([header, *reversed(rows)]))
    refused(run_cli(v3(same_size, tmp_path, "--name", "d", "--resume", path), tmp_path / "out"), "other training data")
    clip = [*TINY, "--train-data", csv, "--logs", tmp_path, "--name", "c", "--resume", path]
    refused(run_cli(clip, tmp_path / "out"), "fastclip-v3", "--fastclip-fresh-state")
    assert snapshot(finished_run) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_state_with_a_file_missing(ranks, csv, finished_run, tmp_path):
    shutil.copytree(finished_run / "run", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "epoch_1.fastclip" / "rank-00000-of-00001.safetensors").unlink()
    flags = v3(csv, tmp_path, "--resume", folder / "epoch_1.pt", "--epochs", 2)
    refused(run_cli(flags, tmp_path / "out", ranks=ranks), "rank-00000-of-00001.safetensors", ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_a_name_that_exists(loss, ranks, csv, finished_run, tmp_path):
    before = snapshot(finished_run)
    flags = [*TINY, "--loss", loss, "--train-data", csv, "--logs", finished_run, "--name", "run"]
    refused(run_cli(flags, tmp_path / "out", ranks=ranks), "--name", "--resume latest", ranks=ranks)
    assert snapshot(finished_run) == before

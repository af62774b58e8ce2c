"""Names that are no UTF-8, as old file servers have them: folders, links, shards, keys, tables, images, runs, logs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli import TINY, run_cli
from make_data import image_of, make_csv, make_shards, sample_files, write_tar

from benchmarks.experiments.run_log import read_settings

NAME = os.fsdecode(b"caf\xe9")  # in Latin-1


def train(folder, *flags, loss="fastclip-v3", ranks=1):
    run = run_cli(
        [*TINY, "--loss", loss, "--logs", folder / "logs", "--name", "run", *flags], folder / "out", ranks=ranks
    )
    assert run.ok and "Logging error" not in str(run) and "Traceback" not in str(run), run
    return (folder / "logs" / "run" / "out.log").read_text()


def of_link(folder):
    make_shards(folder / NAME, shards=2)
    (folder / "link").symlink_to(folder / NAME)
    return f"{folder}/link/{{00000..00001}}.tar"


def of_shard(folder):
    return write_tar(folder / f"{NAME}.tar", [f for n in range(16) for f in sample_files(n, f"{n:04}")])


def of_keys(folder):
    """With one sample that cannot be decoded, and so is named."""
    files = [f for n in range(24) for f in sample_files(n, f"{NAME}/{n}-{NAME}")]
    broken = f"{NAME}/3-{NAME}.png"
    return write_tar(folder / "0.tar", [(name, b"broken" if name == broken else content) for name, content in files])


def of_table(folder):
    (folder / NAME).mkdir()
    return shutil.move(make_csv(folder), folder / NAME / "t.csv")


def of_images(folder):
    (folder / NAME).mkdir()
    lines = ["filepath\ttitle"]
    for n in range(16):
        image_of(n).save(folder / NAME / f"{n}.png")
        lines.append(f"{folder}/{NAME}/{n}.png\tpicture number {n}")
    (folder / "t.csv").write_text("\n".join(lines), errors="surrogateescape")
    return folder / "t.csv"


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        *((make, "fastclip-v3") for make in (of_link, of_shard, of_keys, of_images)),
        *((make, "clip") for make in (of_keys, of_table)),
    ],
)
def test_data_whose_names_are_no_utf8(make, loss, tmp_path):
    data = make(tmp_path)
    log = train(tmp_path, "--train-data", data, "--val-data", data, "--max-unusable", "0.1", loss=loss)
    if make is of_keys:
        assert "sample caf\\udce9/3-caf\\udce9: skipped" in log
    assert read_settings(tmp_path / "logs" / "run")["train_data"] == str(data)


def test_a_run_whose_name_is_no_utf8_goes_on_with_data_whose_names_are_none(tmp_path):
    data = of_shard(tmp_path)
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", data, "--logs", tmp_path / f"logs-{NAME}", "--name", NAME]
    for epochs in (1, 2):
        resume = ["--save-every", "1steps", "--resume", "latest", "--epochs", epochs]
        run = run_cli([*flags, *resume], tmp_path / "out")
        assert run.ok and "Traceback" not in str(run), run
    checkpoints = tmp_path / f"logs-{NAME}" / NAME / "checkpoints"
    assert torch.load(checkpoints / "epoch_2.pt", weights_only=True)["name"] == NAME
    assert (checkpoints / "epoch_2.fastclip" / "index.json").exists()


def test_counts_are_kept_where_nothing_can_be_written_beside_the_shards(tmp_path, monkeypatch):
    """The cache's file in --logs is named by the folder that the link leads to."""
    data = of_link(tmp_path)
    (tmp_path / NAME / "fastclip_sizes.json").mkdir()  # so that no file of this name can be written
    train(tmp_path, "--train-data", data)
    kept = list(Path(tmp_path / "logs").glob("fastclip_sizes_*.json"))
    assert len(kept) == 1 and len(json.loads(kept[0].read_text())) == 2


def test_what_is_missing_is_named(tmp_path):
    flags = [*TINY, "--loss", "fastclip-v3", "--logs", tmp_path / "logs", "--train-data", tmp_path / f"{NAME}.tar"]
    run = run_cli(flags, tmp_path / "out")
    assert run.codes == [2] and "Traceback" not in str(run) and "does not exist" in run.output[0], run

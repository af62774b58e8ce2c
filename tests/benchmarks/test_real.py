"""Scale real: rows on image-text pairs of benchmarks.real_data, which a small folder stands in for."""

import json
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from real_folder import SIZES, make_real_folder
from resolved_flags import resolved

from benchmarks import report, run, tables
from benchmarks.experiments import local, local_data
from benchmarks.experiments.real_pairs import RealPairs
from benchmarks.experiments.store import DONE, Store, key_of
from benchmarks.experiments.table import Comparison, Table
from benchmarks.experiments.training_runs import MODULE
from benchmarks.tables.real_settings import CLIP, V3
from open_clip_train_fastclip.openclip import register_models

register_models()
REAL = [name for name in tables.KNOWN if "real" in tables.load(name).scales]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A table of two rows on the first two of three training shards, 76 pairs of 106, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_data.Real, "val_pairs", 24)
    monkeypatch.setattr(local_data.Real, "val_shards", 2)
    package, dataset = ModuleType("benchmarks.real_data"), ModuleType("benchmarks.real_data.dataset")
    made = []
    dataset.Settings = lambda **settings: made.append(settings) or settings

    def make(out, settings):
        file = out / "dataset.json"
        return json.loads(file.read_text()) if file.is_file() else make_real_folder(out, size=settings["size"])

    dataset.make, package.dataset = make, dataset
    monkeypatch.setitem(sys.modules, "benchmarks.real_data", package)
    monkeypatch.setitem(sys.modules, "benchmarks.real_data.dataset", dataset)
    rows = [replace(row, data=RealPairs(pairs=76, shards=2), batch=16, epochs=2, seeds=1) for row in (CLIP, V3)]
    table = Table("Small", "A question?", tuple(rows), (Comparison("real-clip", "real-v3"),), scales=("real",))
    monkeypatch.setattr(tables, "load", lambda name: table)
    monkeypatch.setattr(tables, "NAMES", ("small",))
    return made


def test_real_pairs_are_trained_on_scored_reported_and_not_run_again(small, tmp_path, capsys):
    arguments = ["small", "--scale", "real", "--results", "results"]
    assert run.main(arguments) == 0
    assert small[0] == {"sets": "colour", "size": 32}
    store = Store(Path("results"))
    assert [row["status"] for row in store.rows.values()] == [DONE, DONE]
    v3 = next(row for row in store.rows.values() if row["loss"] == "fastclip-v3")
    assert v3["scale"] == "real" and v3["train_pairs"] == 76 and [point["samples"] for point in v3["curve"]] == [152]
    for name in ("image_to_text_R@1", "text_to_image_R@5"):  # OpenCLIP evaluated the same model in the run
        assert v3["scores"]["val"][name] == v3["curve"][-1][name]
    assert run.main(arguments) == 0 and "2 runs, 2 of them finished before" in capsys.readouterr().out
    report.main(["--results", "results"])
    text = Path("results/REPORT.md").read_text()
    assert "| OpenCLIP |" in text and "| fastclip-v3 over OpenCLIP | " in text and "not run" not in text


def planned_commands(names, capsys, *options):
    """The command lines that --dry-run prints, in words."""
    assert run.main([*names, "--scale", "real", "--dry-run", *options]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("python -m ")]


@pytest.mark.parametrize("name", REAL)
def test_every_command_at_scale_real_is_one_that_the_training_takes(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # rows on a GPU are planned too
    found = planned_commands([name], capsys, "--results", str(tmp_path))
    assert len(found) == sum(row.seeds for row in tables.load(name).rows_at("real")) > 0
    for command in found:
        args = resolved(*command[command.index(MODULE) + 1 :])
        on_gpu = name == "real_gpu"
        assert (args.device, args.model) == (("cuda", "ViT-S-16") if on_gpu else ("cpu", "ViT-Glyph-32"))
        assert (args.precision, args.force_image_size) == (("amp_bf16", [64]) if on_gpu else ("fp32", None))
        folder = "-".join(["data/real", *["all"] * ("{00000..00041}" in args.train_data), *["64"] * on_gpu])
        assert args.train_data.startswith(f"{folder}/train/{{00000..") and args.batch_size in (32, 128, 256, 512)
        assert args.val_data in (None, f"{folder}/val/{{00000..00003}}.tar")


def test_rows_on_a_gpu_are_left_out_where_there_is_none(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["real_gpu", "real_epochs", "--scale", "real", "--dry-run", "--results", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith(
        "left out: 4 runs on a GPU, since torch sees none here\n4 runs, 0 of them finished before\n"
    )
    assert output.count("--device cpu") == 4 and "--device cuda" not in output


def test_every_row_has_a_seed_before_any_has_its_next(capsys, tmp_path):
    found = planned_commands(["real"], capsys, "--results", str(tmp_path))
    seeds = [command[command.index("--seed") + 1] for command in found]
    rows = len(tables.load("real").rows)
    assert seeds == ["0"] * rows + ["1"] * rows + ["2"] * rows
    assert found[0][found[0].index("--loss") + 1] == found[rows][found[rows].index("--loss") + 1] == "clip"
    assert [seed for _, seed in run.planned(["temperature"], "tiny", 3)] == [0, 1, 2] * 6


def test_the_chosen_settings_are_points_that_were_tuned_and_batches_begin_at_the_main_table():
    tuned, main, batch = (
        {key_of(local.settings_of(row, 0)): row.name for row in tables.load(name).rows}
        for name in ("real_tuning", "real", "real_batch")
    )
    names = {"real-clip", "real-clip-frozen", "real-siglip", "real-v1", "real-v2", "real-v3"}
    assert {main[key] for key in tuned.keys() & main.keys()} == names
    assert {main[key] for key in batch.keys() & main.keys()} == names - {"real-siglip", "real-v2"}
    assert len(tuned) == 26 and sum(name.startswith("real-clip") for name in tuned.values()) == 8


def test_no_loss_has_more_points_of_tuning_than_openclip():
    counts = Counter(row.loss for row in tables.load("real_tuning").rows)
    assert max(counts.values()) == counts["clip"]


def test_data_of_another_size_are_refused_by_number(small, capsys):
    make_real_folder(Path("data", "real"), SIZES | {"train": [40, 30, 36]})
    assert run.main(["small", "--scale", "real", "--results", "results"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data/real/train: the first 2 shards hold 70 pairs and not the 76 that the tables expect" in line


def test_stored_runs_of_other_data_are_not_mixed_with_new_ones(small, row_of, capsys):
    Store(Path("results")).add(row_of(tables.load("small").rows[0], 7, 30.0, data_sha256="other"))
    assert run.main(["small", "--scale", "real", "--results", "results"]) == 2
    assert "data/real differs from the data of the runs in results/runs.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["real", "--scale", "tiny"], "real: there is no --scale tiny of it: take real"),
        (["memory", "--scale", "real"], "memory: there is no --scale real of it: take tiny, medium, large, xlarge"),
        (["real", "--scale", "real", "--launcher", "slurm"], "--scale real runs on this machine"),
        (["real", "--scale", "real", "--quick"], "--quick is of scale tiny"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert run.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

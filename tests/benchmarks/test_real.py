"""Scale real: rows on image-text pairs of benchmarks.real_data, which a small folder stands in for."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from real_folder import make_real_folder

from benchmarks import report, run, tables
from benchmarks.experiments import local_data
from benchmarks.experiments.real_pairs import RealPairs
from benchmarks.experiments.store import DONE, Store
from benchmarks.experiments.table import Comparison, Table
from benchmarks.tables.real_settings import CLIP, V3


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A table of two rows on the first two of three training shards, 76 pairs of 106, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"VAL_PAIRS": 24, "VAL_SHARDS": 2}.items():
        monkeypatch.setattr(local_data, name, value)
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

"""What several tests of the benchmarks share: stored rows, and a small table whose training may be stood in for."""

import logging
from dataclasses import replace

import pytest

from benchmarks import tables
from benchmarks.experiments import glyph_scores, local, real_scores
from benchmarks.experiments.local_data import data_of
from benchmarks.experiments.store import DONE, key_of
from benchmarks.experiments.table import Comparison, Table
from benchmarks.experiments.training_runs import Run
from benchmarks.glyph_data.dataset import Settings
from benchmarks.tables.settings import CLIP, V3

LOG = "Train Epoch: 0 [ 16/64 (25%)] Data (t): 0.1 Batch (t): 0.2, 9/s Logit Scale: 20.0 \n"
FACTS = {
    **{"command": "python -m x", "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.9"}, "commit": "abc"},
    **{"status": DONE, "machine": {"cpu": "some CPU", "cores": 2}, "seconds": 3600, "train_pairs": 4500},
    "data_sha256": "0",
}


@pytest.fixture
def row_of():
    """Makes a line of runs.jsonl in which every recall is `recall` percent (of real pairs that are new one more)."""

    def make(row, seed, recall, **changes):
        scale, scores = data_of(row).scale, {"zero_shot": {"top1": recall / 10, "top5": recall / 5}}
        if scale == "tiny":
            scores |= dict.fromkeys(("reported", "tuning"), dict.fromkeys(glyph_scores.RECALLS, recall))
        else:
            scores |= dict.fromkeys(("val", "tuning"), dict.fromkeys(real_scores.RECALLS, recall))
            scores["val_new"] = dict.fromkeys(real_scores.RECALLS, recall + 1)
            scores["linear_probe"] = {"theme": 2 * recall}
        settings = local.settings_of(row, seed)
        facts = {"key": key_of(settings), "scale": scale, "name": row.name, "settings": settings, **FACTS}
        return {**facts, "scores": scores, "floor": {"R@1": 14.3, "R@5": 68.1}, "tau": 0.05, "curve": [], **changes}

    return make


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """A table of two rows on very little data, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    data = Settings(characters=8, train_per_character=8, val_per_character=12, train_shards=2, val_shards=6)
    rows = [replace(row, data=data, batch=16, epochs=2, curve=row is V3, seeds=1) for row in (CLIP, V3)]
    table = Table("Small", "A question?", tuple(rows), (Comparison("clip", "v3"),))
    monkeypatch.setattr(tables, "load", lambda name: table)
    monkeypatch.setattr(tables, "NAMES", ("small",))
    return table


@pytest.fixture
def stand_in(small_table, row_of, tmp_path, monkeypatch):
    """The training command writes what a run leaves behind; with --loss clip only if there is a file `mended`."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "option = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "folder = Path(option('--logs'), option('--name'), 'checkpoints')\nfolder.mkdir(parents=True)\n"
        "open('started', 'a').write(option('--loss') + '\\n')\n"
        "if option('--loss') == 'clip' and not Path('mended').exists():\n    sys.exit('ValueError: no | such thing')\n"
        "(folder / 'epoch_2.pt').touch()\n"
        f"(folder.parent / 'out.log').write_text({LOG!r})\n"
    )
    monkeypatch.setattr(Run, "command", property(lambda self: [str(script), *self.arguments]))
    scores = row_of(CLIP, 0, 30.0)["scores"]
    monkeypatch.setattr(glyph_scores, "scores", lambda checkpoint, data: scores)
    return tmp_path


@pytest.fixture(autouse=True)
def root_log_level():
    """What sets up a trainer in this process leaves the level of its quiet log behind."""
    before = logging.root.level
    yield
    logging.root.setLevel(before)

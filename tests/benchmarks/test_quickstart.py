"""make quickstart: one command line for every loss, honest failures, runs used again, and the table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import quickstart, run
from benchmarks.experiments import glyph_scores, local, real_scores, run_log
from benchmarks.experiments.glyph_scores import RECALLS
from benchmarks.experiments.table import Kept, arguments_of
from benchmarks.experiments.training_runs import Run, train_all
from benchmarks.glyph_data import dataset
from benchmarks.real_data import dataset as real
from benchmarks.tables.quickstart import TABLE
from open_clip_train_fastclip.loss.config import LOSSES
from open_clip_train_fastclip.openclip.flags import FLAGS

# Stands in for the training command line: writes what a run leaves behind, or fails for --name clip-frozen.
TRAINER = """
import json, sys
from pathlib import Path
option = lambda name: sys.argv[sys.argv.index(name) + 1]
folder = Path(option("--logs"), option("--name"))
(folder / "checkpoints").mkdir(parents=True)
with open(folder.parent / "started", "a") as f:
    f.write(folder.name + "\\n")
if folder.name == "clip-frozen":
    sys.exit("ValueError: no such thing")
(folder / "checkpoints" / "epoch_2.pt").touch()
with open(folder / "out.log", "w") as f:
    for epoch in range(2):
        f.write(f"Train Epoch: {epoch} [ 32/128 (25%)] Data (t): 0.1 Batch (t): 0.200, 9/s Logit Scale: 14.285 \\n")
        f.write(f"Train Epoch: {epoch} [128/128 (100%)] Data (t): 0.1 Batch (t): 0.100, 9/s Logit Scale: 20.000 \\n")
        if folder.name.startswith("fastclip"):
            f.write("FastCLIP Epoch: 1 step: 7 tau: 0.031 gamma: 0.2 visited: 1 tau_lr: 0.001\\n")
recalls = {f"{way}_R@{k}": k / 20 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
with open(folder / "checkpoints" / "results.jsonl", "w") as f:
    for epoch in (1, 2):
        f.write(json.dumps({**recalls, "epoch": epoch}) + "\\n")
"""
INFO = {
    "settings": {"mismatched": 0.3},
    "train_pairs": 4500,
    "mismatched_pairs": 1350,
    "val_pairs": 2400,
    "floor": {"R@1": 12.0, "R@5": 58.8},
    "sha256": "abc",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Nothing is drawn, trained or scored; the settings and folder of data that are asked for are in `made`."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "command", property(lambda run: [str(tmp_path / "trainer.py"), *run.arguments]))
    made = {}
    monkeypatch.setattr(dataset, "make", lambda out, settings: made.update({str(out): settings}) or INFO)
    monkeypatch.setattr(glyph_scores, "scores", scores_of_openclip)
    monkeypatch.setattr(glyph_scores, "floor", lambda data: INFO["floor"])
    return made


def scores_of_openclip(checkpoint, data):
    """Those that the run itself has found last."""
    last = run_log.read_results(checkpoint.parents[1])[-1]
    return {"reported": {name: 100 * last[name] for name in RECALLS}, "zero_shot": {"top1": 1.0, "top5": 5.0}}


def started(folder):
    return (folder / "runs" / "quickstart" / "started").read_text().split()


def test_only_the_loss_flags_differ_between_the_rows():
    commands = {row.name: local.make_run(row, 0, "").arguments for row in TABLE.rows}
    for row in TABLE.rows:
        arguments, own = commands[row.name], arguments_of(row.flags)
        assert arguments[:2] == ["--loss", row.loss] and arguments[-2:] == ["--name", row.name]
        place = arguments.index(own[0]) if own else 0
        assert arguments[place : place + len(own)] == own
        assert arguments[2:place] + arguments[max(2, place + len(own)) : -1] == commands["clip"][2:-1]
    assert "--warmup 85 " in " ".join(commands["clip"])  # 5% of 12 x 141 steps


def test_every_flag_of_a_row_is_one_of_ours():
    assert {flag for row in TABLE.rows for flag in row.flags} <= {*(flag.name for flag in FLAGS), "--temperature"}
    assert {row.loss for row in TABLE.rows} <= {"clip", *LOSSES}


def test_table_curves_and_reuse(stand_in, tmp_path, capsys):
    arguments = ["--losses", "clip", "fastclip-v3", "clip", "--jobs", "2"]
    assert quickstart.main(arguments) == quickstart.main(arguments) == 0
    assert sorted(started(tmp_path)) == ["clip", "fastclip-v3"]  # nothing is started the second time
    folder = tmp_path / "runs" / "quickstart"
    text = (folder / "table.md").read_text()
    output = capsys.readouterr().out
    assert output.count(text) == 2 and "2 runs, 2 of them finished before" in output
    lines = text.splitlines()
    assert "30% of their captions are wrong" in lines[0] and "R@1 12.0 and R@5 58.8" in lines[-1]
    assert lines[0].endswith("(12 epochs, one seed, one CPU thread a run)") and len(lines[2]) == len(lines[5])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert cells[0] == [
        *("loss", "batch", "image→text R@1", "R@5", "text→image R@1", "R@5", "final tau", "samples/s", "minutes")
    ]
    assert cells[2][:7] == ["OpenCLIP", "32", "5.0", "25.0", "5.0", "25.0", "0.050"]
    assert cells[3][0] == "fastclip-v3" and cells[3][6] == "0.031"
    assert cells[2][7:] == ["256", "0.0"]  # 128 pairs an epoch, one batch in 0.2 s and three in 0.1 s each
    assert (folder / "curves.png").stat().st_size > 1000
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"][1]["tau"] == 0.031 and "--loss fastclip-v3" in table["rows"][1]["command"]
    assert table["data"] == INFO and (folder / "fastclip-v3" / "checkpoints" / "epoch_2.pt").is_file()


def test_runs_on_other_data_are_not_used_again(stand_in, tmp_path, monkeypatch, capsys):
    assert quickstart.main(["--losses", "clip"]) == 0
    train_all([local.make_run(TABLE.rows[0], 0, "other data")], jobs=1)
    assert started(tmp_path) == ["clip", "clip"]
    monkeypatch.setattr(dataset, "make", lambda out, settings: {**INFO, "sha256": "other data"})
    assert quickstart.main(["--losses", "clip", "fastclip-v3"]) == 2
    assert "data/glyphs differs from the data of the runs in runs/quickstart/runs.jsonl" in capsys.readouterr().err


def test_a_failed_run_shows_its_last_line_and_the_exit_code_is_not_zero(stand_in, tmp_path, capsys):
    assert quickstart.main(["--losses", "clip-frozen", "clip", "--jobs", "1"]) == 1
    output = capsys.readouterr().out
    assert "OpenCLIP, temperature frozen failed: ValueError: no such thing" in output and "| OpenCLIP  " in output
    assert "| OpenCLIP, temperature frozen | failed |" in output
    assert quickstart.main(["--losses", "clip-frozen", "clip"]) == 1  # the failed run is tried again, the other is not
    assert started(tmp_path) == ["clip-frozen", "clip", "clip-frozen"]
    rows = json.loads((tmp_path / "runs" / "quickstart" / "table.json").read_text())["rows"]
    assert rows[0]["failed"] == "ValueError: no such thing"


def test_a_folder_that_is_not_a_run_of_ours_is_left_alone(stand_in, tmp_path, capsys):
    precious = tmp_path / "runs" / "quickstart" / "clip" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    assert quickstart.main(["--losses", "clip"]) == 2
    assert "move it away" in capsys.readouterr().err and precious.exists()


def test_another_share_of_wrong_captions_has_folders_of_its_own(stand_in, tmp_path):
    assert quickstart.main(["--losses", "clip", "--mismatched", "0"]) == 0
    assert stand_in == {"data/glyphs-mismatched-0": dataset.Settings(mismatched=0.0)}
    assert (tmp_path / "runs" / "quickstart-mismatched-0" / "table.md").is_file()


def test_the_runner_of_the_tables_runs_the_same_and_a_quick_try_leaves_its_folders_alone(stand_in, tmp_path):
    assert run.main(["quickstart", "--scale", "tiny", "--results", "results"]) == 1
    runs = tmp_path / "runs" / "quickstart"
    assert {path.name for path in runs.iterdir() if path.is_dir()} == {row.name for row in TABLE.rows}
    assert quickstart.main(["--losses", "clip", "fastclip-v3"]) == 0
    assert len(started(tmp_path)) == len(TABLE.rows)
    assert run.main(["quickstart", "--scale", "tiny", "--quick"]) == 0
    assert len(started(tmp_path)) == len(TABLE.rows)


def test_real_pairs_have_columns_and_folders_of_their_own(stand_in, tmp_path, monkeypatch, capsys):
    facts = {"settings": {}, "train_pairs": 38_330, "val_pairs": 2_000, "splits": {"val_new": 1_000}, "sha256": "abc"}
    asked = []
    monkeypatch.setattr(real, "make", lambda *words: asked.append(words) or facts)
    for split, sizes in (("train", [2_017] * 4 + [2_018]), ("val", [500] * 4)):
        (tmp_path / "data" / "real" / split).mkdir(parents=True)
        shards = {f"{number:05d}.tar": size for number, size in enumerate(sizes)}
        (tmp_path / "data" / "real" / split / "sizes.json").write_text(json.dumps(shards))
    recalls = dict.fromkeys(real_scores.RECALLS, 9.0)
    scores = {"val": recalls, "tuning": recalls, "val_new": dict.fromkeys(real_scores.RECALLS, 7.0)}
    scores |= {"zero_shot": {"top1": 1.0, "top5": 5.0}, "linear_probe": {"theme": 40.0}}
    monkeypatch.setattr(real_scores, "scores", lambda *words: scores)
    assert quickstart.main(["--data", "real", "--losses", "clip", "fastclip-v3"]) == 0
    assert set(asked) == {(Path("data/real"), real.Settings("colour", 32))} and not stand_in
    text = (tmp_path / "runs" / "quickstart-real" / "table.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("**Real pairs: 10,086 training pairs")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][6:8] == ["R@1, new captions", "final tau"] and lines[2][2:8] == ["9.0"] * 4 + ["7.0", "0.050"]
    facts = json.loads((tmp_path / "runs" / "quickstart-real" / "table.json").read_text())
    assert facts["data"]["train_pairs"] == 10_086  # and not all that the folder holds
    assert "1,000 more pairs" in text.splitlines()[-1]
    assert quickstart.main(["--data", "real", "--mismatched", "0.3"]) == 2
    assert "--mismatched is of --data glyphs: leave it out" in capsys.readouterr().err


def test_misspelt_loss_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        quickstart.main(["--losses", "fastclip-v9"])
    assert exit.value.code == 2 and "fastclip-v9" in capsys.readouterr().err


def test_a_real_run_of_one_epoch(tmp_path):
    """The log and the results of the real command line are what run_log reads, and the table has OpenCLIP's scores."""
    data = dataset.Settings(characters=8, train_per_character=16, val_per_character=8, train_shards=2)
    kept = Kept(tmp_path / "data", tmp_path / "runs")
    row = replace(TABLE.rows[-1], data=data, epochs=1, kept=kept)
    assert quickstart.compare([row], jobs=1) == 0
    folder = kept.runs / "fastclip-v3"
    log, results = run_log.read_log(folder), run_log.read_results(folder)
    assert run_log.samples_done(log) == 128 and run_log.samples_per_second(log) > 1
    (shown,) = json.loads((kept.runs / "table.json").read_text())["rows"]
    assert 0.01 < shown["tau"] < 0.1 and len(results) == 1
    assert 0 <= results[0]["text_to_image_R@1"] <= 1
    assert {name: shown[name] for name in RECALLS} == {name: round(100 * results[0][name], 2) for name in RECALLS}

"""make quickstart: one command line for every loss, honest failures, runs used again, and the table."""

import json
import shlex

import pytest

from benchmarks import quickstart, quickstart_table
from benchmarks.experiments import run_log
from benchmarks.experiments.training_runs import Run, train_all
from benchmarks.glyph_data import dataset
from open_clip_train_fastclip.errors import UserError
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
    "settings": {"train_shards": 16, "val_shards": 4, "mismatched": 0.3},
    "train_pairs": 4500,
    "mismatched_pairs": 1350,
    "val_pairs": 2400,
    "floor": {"R@1": 12.0, "R@5": 58.8},
    "sha256": "abc",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(Run, "command", property(lambda run: [str(tmp_path / "trainer.py"), *run.arguments]))
    return tmp_path / "runs"


def make_plan(losses, logs, **changes):
    return quickstart.plan(losses, logs.parent / "data", logs, {**INFO, **changes}, epochs=2)


def started(logs):
    return (logs / "started").read_text().split()


def test_only_the_loss_flags_differ_between_the_rows(tmp_path):
    runs = quickstart.plan(list(quickstart.LOSSES), tmp_path, tmp_path, INFO, epochs=12)
    for run in runs:
        own = shlex.split(quickstart.LOSSES[run.name])
        assert run.arguments[: len(own)] == own and run.arguments[-1] == run.name
        assert run.arguments[len(own) : -1] == runs[0].arguments[2:-1]
    assert "--warmup 85 " in " ".join(runs[0].arguments) + " "  # 5% of 12 x 141 steps


def test_every_flag_of_a_row_is_one_of_ours():
    words = shlex.split(" ".join(quickstart.LOSSES.values()))
    assert {word for word in words if word.startswith("--")} <= {*FLAGS, "--temperature"}
    assert {words[i + 1] for i, word in enumerate(words) if word == "--loss"} <= set(FLAGS["--loss"]["choices"])


def test_table_curves_and_reuse(stand_in):
    losses = ["clip", "fastclip-v3"]
    train_all(make_plan(losses, stand_in), jobs=2)
    runs = make_plan(losses, stand_in)
    train_all(runs, jobs=2)  # the same command and data: nothing is started
    assert sorted(started(stand_in)) == sorted(losses)
    text = quickstart_table.write_table(runs, INFO, stand_in)
    lines = text.splitlines()
    assert "30% of their captions are wrong" in lines[0] and "R@1 12.0 and R@5 58.8" in lines[-1]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert cells[0] == list(quickstart_table.HEADER)
    assert cells[2][:7] == ["OpenCLIP", "32", "5.0", "25.0", "5.0", "25.0", "0.050"]
    assert cells[3][0] == "fastclip-v3" and cells[3][6] == "0.031"
    assert cells[2][7] == "256"  # 128 pairs an epoch, one batch in 0.2 s and three in 0.1 s each
    assert (stand_in / "table.md").read_text() == text and (stand_in / "curves.png").stat().st_size > 1000
    rows = json.loads((stand_in / "table.json").read_text())["rows"]
    assert rows[1]["tau"] == 0.031 and "--loss fastclip-v3" in rows[1]["command"]
    train_all(make_plan(["clip"], stand_in, sha256="other data"), jobs=1)
    assert started(stand_in).count("clip") == 2


def test_a_failed_run_shows_its_last_line_and_the_exit_code_is_not_zero(stand_in, monkeypatch, capsys):
    monkeypatch.chdir(stand_in.parent)
    monkeypatch.setattr(dataset, "make", lambda out, settings: INFO)
    monkeypatch.setattr(quickstart, "EPOCHS", 2)
    assert quickstart.main(["--losses", "clip-frozen", "clip", "--jobs", "1"]) == 1
    output = capsys.readouterr().out
    assert "OpenCLIP, temperature frozen failed: ValueError: no such thing" in output and "| OpenCLIP  " in output
    assert quickstart.main(["--losses", "clip-frozen", "clip"]) == 1  # the failed run is tried again, the other is not
    assert started(stand_in.parent / "runs" / "quickstart") == ["clip-frozen", "clip", "clip-frozen"]


def test_a_folder_that_is_not_a_run_of_ours_is_left_alone(stand_in):
    (stand_in / "clip").mkdir(parents=True)
    (stand_in / "clip" / "precious").touch()
    with pytest.raises(UserError, match="move it away"):
        train_all(make_plan(["clip"], stand_in), jobs=1)
    assert (stand_in / "clip" / "precious").exists()


def test_another_share_of_wrong_captions_has_folders_of_its_own(stand_in, monkeypatch):
    monkeypatch.chdir(stand_in.parent)
    made = []
    monkeypatch.setattr(dataset, "make", lambda out, settings: made.append((str(out), settings.mismatched)) or INFO)
    monkeypatch.setattr(quickstart, "EPOCHS", 2)
    assert quickstart.main(["--losses", "clip", "--mismatched", "0"]) == 0
    assert made == [("data/glyphs-mismatched-0", 0.0)]
    assert (stand_in.parent / "runs" / "quickstart-mismatched-0" / "table.md").is_file()


def test_misspelt_loss_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        quickstart.main(["--losses", "fastclip-v9"])
    assert exit.value.code == 2 and "fastclip-v9" in capsys.readouterr().err


def test_a_real_run_of_one_epoch(tmp_path):
    """The log and the results of the real command line are what run_log reads."""
    settings = dataset.Settings(characters=4, train_per_character=32, val_per_character=8, train_shards=2, val_shards=1)
    info = dataset.make(tmp_path / "data", settings)
    run = quickstart.plan(["fastclip-v3"], tmp_path / "data", tmp_path / "runs", info, epochs=1)[0]
    train_all([run], jobs=1)
    assert run.error is None and run.record["exit_code"] == 0, run.error
    log, results = run_log.read_log(run.folder), run_log.read_results(run.folder)
    assert run_log.samples_done(log) == run.steps * run.batch == 128 and run_log.samples_per_second(log) > 1
    assert 0.01 < run_log.final_temperature(log) < 0.1 and len(results) == 1
    assert 0 <= results[0]["text_to_image_R@1"] <= 1

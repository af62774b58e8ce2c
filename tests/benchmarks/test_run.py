"""python -m benchmarks.run: what it plans, runs and finds again, on this machine and on a cluster."""

import json
import os
import shlex
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from resolved_flags import recipe_flags, resolved
from trajectories import GOLDEN_LOSSES

from benchmarks import report, run, tables
from benchmarks.experiments import cluster, glyph_scores
from benchmarks.experiments.store import DONE, FAILED, Store
from benchmarks.experiments.table import Table
from benchmarks.experiments.training_runs import MODULE
from open_clip_train_fastclip.openclip import register_models

register_models()


def commands(output):
    """The command lines that --dry-run printed, in words."""
    return [shlex.split(line) for line in output.splitlines() if " " in line and not line.endswith("finished before")]


@pytest.mark.parametrize("name", [name for name in tables.KNOWN if "tiny" in tables.load(name).scales])
def test_every_command_at_scale_tiny_is_one_that_the_training_takes(name, capsys, tmp_path):
    assert run.main([name, "--scale", "tiny", "--dry-run", "--results", str(tmp_path)]) == 0
    found = commands(capsys.readouterr().out)
    assert found
    for command in found:
        arguments = command[command.index(MODULE) + 1 :]
        args = resolved(*[word for word in arguments if word != "--"])
        ranks = int(command[command.index("--nproc_per_node") + 1]) if "--nproc_per_node" in command else 1
        assert args.device == "cpu" and args.batch_size * ranks in (16, 32, 64, 128, 256) and args.lr


@pytest.mark.parametrize("scale", ["medium", "large", "xlarge"])
def test_every_command_at_a_larger_scale_is_one_that_the_training_takes(scale, capsys, tmp_path):
    assert run.main(["all", "--scale", scale, "--dry-run", "--seeds", "1", "--results", str(tmp_path)]) == 0
    found = commands(capsys.readouterr().out)
    assert len({command[command.index("--name") + 1] for command in found}) == len(found) > 1
    for command in found:
        recipe, loss = (word.split("=")[1] for word in command[1:3])
        own = command[command.index(cluster.SCRIPT) + 1 :]
        args = resolved(*recipe_flags(recipe, loss), *own)
        assert args.seed == cluster.FIRST_SEED and args.name in command[4]


def test_dry_run_prints_exactly_what_is_submitted(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET_VAL", "/data/imagenet/val")
    arguments = ["laion400m", "--scale", "xlarge", "--launcher", "slurm", "--seeds", "2", "--dry-run"]
    assert run.main([*arguments, "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 runs, 0 of them finished before" and len(lines) == 5
    key = cluster.Job(tables.load("laion400m").rows[-1], "xlarge", 1).key
    name = f"xlarge_laion400m-fastclip-v3-4nodes-seed2025-{key}"
    assert lines[-1] == (
        f"env RECIPE=xlarge_laion400m LOSS=fastclip-v3 sbatch --job-name={name} --nodes=4 "
        f"scripts/slurm/fastclip_32gpu.sh --name {name} --seed 2025 --imagenet-val /data/imagenet/val "
        "--zeroshot-frequency 1"
    )


def test_two_tables_hold_all_losses_of_the_paper_each_on_the_published_nodes(capsys, tmp_path):
    arguments = ["gamma_schedule", "temperature", "--scale", "large", "--seeds", "2", "--dry-run"]
    assert run.main([*arguments, "--results", str(tmp_path)]) == 0
    found = commands(capsys.readouterr().out)
    assert len(found) == 16  # seven losses, and OpenCLIP with a frozen temperature, with two seeds each
    assert {command[2] for command in found} == {f"LOSS={loss}" for loss in ("clip", *GOLDEN_LOSSES)}
    assert {command[5] for command in found} == {"--nodes=2"}


# --- a table that is really run


def test_a_real_table_is_run_scored_reported_and_not_repeated(small_table, tmp_path, capsys):
    arguments = ["small", "--scale", "tiny", "--results", str(tmp_path / "results")]
    assert run.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "results" / "runs.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == [DONE, DONE]
    v3 = next(row for row in rows if row["loss"] == "fastclip-v3")
    assert [point["samples"] for point in v3["curve"]] == [128] and v3["train_pairs"] == 64
    for name in glyph_scores.RECALLS:  # OpenCLIP evaluated the same model on the same pairs in the run
        assert v3["scores"]["reported"][name] == v3["curve"][-1][name]
    assert 0.01 < v3["tau"] < 0.1 and 0 <= v3["scores"]["zero_shot"]["top1"] <= v3["scores"]["zero_shot"]["top5"]
    assert v3["versions"]["torch"] and v3["machine"]["cores"] and "--loss fastclip-v3" in v3["command"]
    capsys.readouterr()
    assert run.main(arguments) == 0
    assert capsys.readouterr().out == "2 runs, 2 of them finished before\n"
    assert report.main(["--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results" / "REPORT.md").read_text()
    assert "| fastclip-v3 (16 pairs, 1 rank) | " in text and "not run" not in text


def test_a_failed_run_is_shown_with_its_last_line_and_tried_again(stand_in):
    arguments = ["small", "--scale", "tiny", "--jobs", "1", "--results", "results"]
    assert run.main(arguments) == 1
    report.main(["--results", "results"])
    text = Path("results/REPORT.md").read_text()
    assert (
        "| OpenCLIP (16 pairs, 1 rank) |  |  |  |  |  |  |  |  | 0, 1 failed: ValueError: no \\| such thing |" in text
    )
    assert "| fastclip-v3 (16 pairs, 1 rank) | 30.0 |" in text
    Path("mended").touch()
    assert run.main(arguments) == 0
    assert Path("started").read_text().split() == ["clip", "fastclip-v3", "clip"]
    report.main(["--results", "results"])
    assert "failed" not in Path("results/REPORT.md").read_text()
    assert run.main([*arguments[:-1], "other"]) == 0  # stored elsewhere, all is run anew
    assert len(Path("started").read_text().split()) == 5


def test_quick_is_one_seed_and_fewer_epochs_in_a_folder_of_its_own(stand_in):
    Path("mended").touch()
    assert run.main(["small", "--scale", "tiny", "--quick"]) == 0
    store = Store(Path("runs/quick"))
    assert [row["settings"]["epochs"] for row in store.rows.values()] == [1, 1]
    report.main(["--quick"])
    assert "| OpenCLIP (16 pairs, 1 rank) | 30.0 |" in Path("runs/quick/REPORT.md").read_text()


def test_stored_runs_of_other_data_are_not_mixed_with_new_ones(row_of, stand_in, capsys):
    Store(Path("results")).add(row_of(tables.load("small").rows[0], 7, 30.0, data_sha256="other"))
    assert run.main(["small", "--scale", "tiny", "--results", "results"]) == 2
    assert "differs from the data of the runs in results/runs.jsonl" in capsys.readouterr().err
    assert not Path("started").exists()


def test_what_ran_on_gpus_of_this_machine_is_stored_with_its_row(stand_in, monkeypatch):
    Path("mended").touch()
    rows = [replace(row, larger={"--stop-epochs": 2}) for row in tables.load("small").rows]
    monkeypatch.setattr(tables, "load", lambda name: Table("Small", "A question?", (*rows, replace(rows[0], nodes=8))))
    monkeypatch.setattr(cluster, "require_gpus_and_data", lambda scale: 2)
    monkeypatch.setenv("LOGS", "logs")
    assert run.main(["small", "--scale", "medium", "--launcher", "local", "--results", "results"]) == 0
    store = Store(Path("results"))
    found = [store.get(cluster.Job(row, "medium", 0).key) for row in rows]
    assert [(row["status"], row["machine"]["gpus"], row["tau"]) for row in found] == [(DONE, 2, 0.05)] * 2
    assert len(store.rows) == 2  # a row about 8 nodes is left to SLURM


# --- the cluster


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """sbatch notes what it gets, squeue says what the file `queue` says, and LOGS is a folder."""
    for name, body in {"sbatch": f'echo "$@" >>{tmp_path}/sent; echo job 7', "squeue": f"cat {tmp_path}/queue"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "queue").touch()
    (tmp_path / "sent").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("IMAGENET_VAL", "/data/imagenet/val")
    return tmp_path


def leave(folder, epochs):
    """What a run of `epochs` epochs leaves in its folder."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / f"epoch_{epochs}.pt").touch()
    results = {"epoch": epochs, "imagenet-zeroshot-val-top1": 0.53}
    (folder / "checkpoints" / "results.jsonl").write_text(json.dumps(results) + "\n")
    (folder / "out.log").write_text(
        "Train Epoch: 0 [ 16/64 (25%)] Data (t): 0.1 Batch (t): 0.2, 9/s Logit Scale: 20.0 "
    )


def test_what_is_missing_is_submitted_and_what_ended_is_collected(slurm):
    arguments = ["laion400m", "--scale", "xlarge", "--seeds", "1", "--results", str(slurm / "results")]
    clip, v3 = (cluster.Job(row, "xlarge", 0) for row in tables.load("laion400m").rows_at("xlarge"))
    leave(slurm / "logs" / clip.name, 30)
    leave(slurm / "logs" / v3.name, 4)
    (slurm / f"slurm-{v3.name}-7.out").write_text("some\nfastclip_32gpu.sh: error: out of memory\n")
    assert run.main(arguments) == 0
    assert [v3.name in line for line in (slurm / "sent").read_text().splitlines()] == [True]
    store = Store(slurm / "results")
    assert store.get(clip.key)["status"] == DONE and store.get(clip.key)["tau"] == 0.05
    assert store.get(clip.key)["curve"][0]["imagenet-zeroshot-val-top1"] == 53.0
    assert store.get(v3.key)["status"] == FAILED and store.get(v3.key)["error"].endswith("out of memory")
    (slurm / "queue").write_text(f"{v3.name}\n")
    assert run.main(arguments) == 0
    assert len((slurm / "sent").read_text().splitlines()) == 1  # it waits in the queue
    for folder, suite, epoch, hour, value in (
        (slurm / "results", "retrieval", 30, 1, 0.412),
        (slurm / "results", "retrieval", 5, 3, 0.2),  # an earlier checkpoint of the run, evaluated later
        (slurm / "logs" / "eval-a-epoch_30-7", "datacomp", 30, 2, 0.331),  # where scripts/slurm/eval.sh leaves it
        (slurm / "logs" / "eval-a-epoch_30-6", "datacomp", 30, 1, 0.1),
    ):
        checkpoint = f"logs/{clip.name}/checkpoints/epoch_{epoch}.pt"
        row = {"kind": "mean", "checkpoint": checkpoint, "suite": suite, "value": value, "date": f"2026-01-01T0{hour}"}
        folder.mkdir(exist_ok=True)
        with (folder / "evaluate.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    report.main(["--results", str(slurm / "results")])
    text = (slurm / "results" / "REPORT.md").read_text()
    assert "| OpenCLIP | 41.2 | 33.1 | 53.0 | 0.050 | 1 | 62.91 at 42 epochs; 53.36 at 30 epochs |" in text
    assert "0, 1 failed: fastclip_32gpu.sh: error: out of memory" in text


def test_a_refusal_of_sbatch_is_one_line(slurm, capsys):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    assert run.main(["laion400m", "--scale", "xlarge", "--seeds", "1", "--results", str(slurm / "results")]) == 2
    assert "invalid account" in capsys.readouterr().err


# --- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--scale", "tiny"], "there is no table nothing: take one of gamma_schedule"),
        (["memory", "--scale", "tiny", "--launcher", "slurm"], "--scale tiny runs on this machine"),
        (["memory", "--scale", "medium", "--quick"], "--quick is of scale tiny"),
        (["laion400m", "--scale", "xlarge"], "export IMAGENET_VAL"),
        (["memory", "--scale", "medium"], "there is no sbatch here: run this on the cluster, or add --dry-run"),
        (
            ["memory", "--scale", "medium", "--launcher", "local"],
            "--launcher local lacks a GPU (torch sees none) and the data ($DATA/cc3m_train/00000.tar; DATA names",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.torch.cuda, "is_available", lambda: False)
    for name in ("DATA", "IMAGENET_VAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.main([*arguments, "--results", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--seeds", "0", "choose from 1, 2, 3"), ("--seeds", "4", "choose from"), ("--jobs", "0", "is no number of 1")],
)
def test_numbers_of_runs_that_there_are_not_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["memory", "--scale", "tiny", option, value])
    assert message in capsys.readouterr().err

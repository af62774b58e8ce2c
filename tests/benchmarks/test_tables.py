"""The tables of the benchmarks: what is run, what is found again, and what the report makes of it."""

import json
import os
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from resolved_flags import recipe_flags, resolved

import open_clip_train_fastclip
from benchmarks import report, run, tables
from benchmarks.experiments import cluster, glyph_scores, sections, tiny
from benchmarks.experiments.measured import Figure, Measured, fewer_samples, published, published_gain
from benchmarks.experiments.store import DONE, FAILED, Store, key_of
from benchmarks.experiments.table import NOISY, Comparison, Row, Table, arguments_of
from benchmarks.experiments.training_runs import MODULE, Run
from benchmarks.glyph_data import dataset
from open_clip_train_fastclip.errors import UserError

open_clip.add_model_config(Path(open_clip_train_fastclip.__file__).parent / "model_configs")
CLIP = Row("clip", "OpenCLIP", "clip", tiny={"--lr": 1e-3})
V3 = Row("v3", "fastclip-v3", "fastclip-v3", tiny={"--lr": 1e-3, "--fastclip-rho": 2.5})
LOG = "Train Epoch: 0 [ 16/64 (25%)] Data (t): 0.1 Batch (t): 0.2, 9/s Logit Scale: 20.0 \n"
FACTS = {
    **{"command": "python -m x", "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.9"}, "commit": "abc"},
    **{"machine": {"cpu": "some CPU", "cores": 2}, "seconds": 3600, "train_pairs": 4500, "data_sha256": "0"},
}


def commands(output):
    """The command lines that --dry-run printed, in words."""
    return [shlex.split(line) for line in output.splitlines() if " " in line and not line.endswith("finished before")]


def row_of(row, seed, recall, **changes):
    """A line of runs.jsonl in which every recall of the reported pairs is `recall` percent."""
    recalls = dict.fromkeys(glyph_scores.RECALLS, recall)
    scores = {"reported": recalls, "tuning": recalls, "zero_shot": {"top1": recall / 10, "top5": recall / 5}}
    settings = tiny.settings_of(row, seed)
    facts = {"key": key_of(settings), "scale": "tiny", "name": row.name, "settings": settings, "status": DONE, **FACTS}
    return {**facts, "scores": scores, "floor": {"R@1": 14.3, "R@5": 68.1}, "tau": 0.05, "curve": [], **changes}


@pytest.mark.parametrize("name", tables.NAMES)
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


def test_a_run_of_two_tables_has_one_name_on_the_cluster():
    two_nodes = next(row for row in tables.load("scaling").rows if row.name == "v3-x2")
    published_setting = next(row for row in tables.load("temperature").rows if row.name == "v3")
    names = {cluster.Job(row, "medium", 0).name for row in (two_nodes, published_setting)}
    assert len(names) == 1


@pytest.mark.parametrize("scale", cluster.RECIPES)
@pytest.mark.parametrize("loss", ["clip", "sogclr", "fastclip-v3"])
def test_recipes_are_read_as_the_batch_script_reads_them(scale, loss):
    flags = cluster.recipe_flags(scale, loss)
    words = [word.replace("$DATA", "/data") for word in arguments_of(flags)]
    assert [*words, "--loss", loss] == recipe_flags(cluster.RECIPES[scale], loss)


def test_the_same_settings_are_the_same_run_whichever_table_asks():
    keys = {
        name: {row.loss: key_of(tiny.settings_of(row, 0)) for row in tables.load(name).rows if not row.flags}
        for name in ("temperature", "gradients", "memory", "laion400m")
    }
    assert keys["temperature"]["fastclip-v3"] == keys["gradients"]["fastclip-v3"] == keys["laion400m"]["fastclip-v3"]
    assert keys["temperature"]["clip"] == keys["memory"]["clip"]
    scaling = {row.name: key_of(tiny.settings_of(row, 0)) for row in tables.load("scaling").rows}
    assert scaling["v3-x1"] == keys["laion400m"]["fastclip-v3"] and len(set(scaling.values())) == 12


@pytest.mark.parametrize(
    ("table", "name", "seed", "key"),
    [
        ("temperature", "v3", 0, "069f07f70441"),
        ("optimizers", "v3-sgd", 0, "039e097e6474"),
        ("scaling", "clip-x8", 1, "00eb941000d3"),
        ("map", "v3-partial", 0, "4e743dd0e8db"),
        ("step_time", "v1-step-x2", 0, "18f4dcf6c7df"),
    ],
)
def test_the_stored_runs_are_still_found(table, name, seed, key):
    row = next(row for row in tables.load(table).rows if row.name == name)
    assert key_of(tiny.settings_of(row, seed)) == key and Store().is_done(key)


@pytest.mark.parametrize(
    "change",
    [{"tiny": {"--lr": 2e-3}}, {"batch": 64}, {"epochs": 2}, {"ranks": 2}, {"data": replace(NOISY, seed=1)}],
)
def test_other_settings_are_another_run(change):
    keys = {key_of(tiny.settings_of(row, seed)) for row in (CLIP, replace(CLIP, **change)) for seed in (0, 1)}
    assert len(keys) == 4


def test_of_two_rows_the_newest_counts_and_none_is_lost(tmp_path):
    store = Store(tmp_path)
    store.add({"key": "a", "status": FAILED})
    assert not store.is_done("a")
    store.add({"key": "a", "status": DONE})
    assert Store(tmp_path).is_done("a") and len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2


# --- a table that is really run


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """A table of two rows on very little data, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    data = dataset.Settings(characters=8, train_per_character=8, val_per_character=12, train_shards=2, val_shards=6)
    rows = [replace(row, data=data, batch=16, epochs=2, curve=row is V3, seeds=1) for row in (CLIP, V3)]
    table = Table("Small", "A question?", tuple(rows), (Comparison("clip", "v3"),))
    monkeypatch.setattr(tables, "load", lambda name: table)
    monkeypatch.setattr(tables, "NAMES", ("small",))
    return table


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
    assert "| fastclip-v3 (16 pairs, 1 rank) | " in text and "not run" not in text.split("### Scale medium")[0]


@pytest.fixture
def stand_in(small_table, tmp_path, monkeypatch):
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
    monkeypatch.setattr(tiny, "scores", lambda checkpoint, data: scores)
    return tmp_path


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


def test_stored_runs_of_other_data_are_not_mixed_with_new_ones(stand_in, capsys):
    Store(Path("results")).add(row_of(tables.load("small").rows[0], 7, 30.0, data_sha256="other"))
    assert run.main(["small", "--scale", "tiny", "--results", "results"]) == 2
    assert "differs from the data of the runs in results/runs.jsonl" in capsys.readouterr().err
    assert not Path("started").exists()


# --- what the report makes of known rows


def measured(row, rows, scale="tiny"):
    store = Store(Path("/nonexistent"))
    store.rows = {line["key"]: line for line in rows}
    return Measured(row, scale, store, {})


def test_mean_and_deviation_over_seeds():
    found = measured(CLIP, [row_of(CLIP, seed, recall) for seed, recall in enumerate((10.0, 12.0, 14.0))])
    assert found.metric("R@1") == Figure(12.0, 2.0, 3) and sections.cell(found.metric("R@1")) == "12.0 (2.0)"
    assert sections.cell(found.metric("top1")) == "1.2 (0.2)"
    one = measured(CLIP, [row_of(CLIP, 0, 10.0)])
    assert sections.cell(one.metric("R@1")) == "10.0" and sections.status(one) == "1"


def test_gain_is_that_of_the_same_seeds_with_its_standard_error():
    rows = [row_of(CLIP, seed, recall) for seed, recall in enumerate((10.0, 12.0, 14.0))]
    rows += [row_of(V3, seed, recall) for seed, recall in enumerate((20.0, 20.0, 23.0))]
    table = Table("T", "Q", (CLIP, V3), (Comparison("clip", "v3"),))
    text = sections.comparison_table(table, [measured(CLIP, rows), measured(V3, rows)], "tiny")
    # gains of 10, 8 and 9: a deviation of 1 over the root of three seeds
    assert text.splitlines()[-1].startswith("| fastclip-v3 over OpenCLIP | +9.0 (0.6) | +0.9 (0.1) |")
    only_one = measured(V3, [row_of(V3, 1, 20.0)])  # compared with seed 1 alone, not with the mean of three
    assert (
        sections.comparison_table(table, [measured(CLIP, rows), only_one], "tiny")
        .splitlines()[-1]
        .startswith("| fastclip-v3 over OpenCLIP | +8.0 | +0.8 |")
    )


def curve(**points):
    return {int(samples[1:]): Figure(score, 0, 1) for samples, score in points.items()}


@pytest.mark.parametrize(
    ("better", "factor"),
    [
        (curve(s50=10.0, s100=30.0), 100 / 75),  # reaches 20 half way between 50 and 100
        (curve(s50=40.0, s100=50.0), 4.0),  # half way to the first evaluation, from 0
        (curve(s50=20.0, s100=50.0), 2.0),
        (curve(s50=10.0, s100=19.0), None),
        ({}, None),
    ],
)
def test_fewer_samples(better, factor):
    found = fewer_samples(curve(s50=15.0, s100=20.0), better)
    assert found == (factor and pytest.approx(factor))


def test_published_numbers_stand_beside_their_rows():
    rows = {row.name: row for row in tables.load("gamma_schedule").rows}
    table = tables.load("gamma_schedule")
    assert published(table, rows["v1"], "medium")["datacomp"] == "24.87 (0.13)"
    gain = {"datacomp": "+1.46", "retrieval": "+1.80", "imagenet_variants": "+1.96"}
    assert published_gain(table, rows["sogclr"], rows["v1"], "medium") == gain
    scaling = tables.load("scaling")
    base, _, better = scaling.rows[-3:]
    assert published(scaling, base, "large") == {"imagenet_variants": "22.78"}
    assert published_gain(scaling, base, better, "large") == {
        "imagenet_variants_gap": "2.16",
        "fewer_samples_factor": "1.31",
    }
    temperature = tables.load("temperature")  # without nodes: those of the published setting
    assert published(temperature, temperature.rows[0], "medium") == {"imagenet_variants": "14.73"}
    frozen = next(row for row in temperature.rows if row.name == "clip-frozen")
    assert published(scaling, replace(frozen, nodes=1), "medium") == {}  # nobody has published it


def test_tuning_shows_the_best_of_each_loss_and_what_is_taken():
    points = [replace(CLIP, name=f"p{lr}", label=f"OpenCLIP: lr {lr}", tiny={"--lr": lr}) for lr in (1, 2)]
    rows = [row_of(point, 0, recall) for point, recall in zip(points, (10.0, 11.0), strict=True)]
    text = sections.tuning_table([measured(point, rows) for point in points], {rows[0]["key"]})
    assert text.splitlines()[2:] == [
        "| OpenCLIP: lr 1 | 10.0 | 0.050 | 1 | yes |",
        "| OpenCLIP: lr 2 | **11.0** | 0.050 | 1 |  |",
    ]


def test_all_tables_render_from_stored_rows(tmp_path):
    store = Store(tmp_path)
    for name in tables.NAMES:
        for row in tables.load(name).rows_at("tiny"):
            points = [{"samples": n, **dict.fromkeys(glyph_scores.RECALLS, n / 3000)} for n in (27000, 54000)]
            changes = {"curve": points} if row.curve else {}
            changes |= {"step_time": {"total": 9.5, "loss": 1.5, "others": 8.0}} if "--profile" in row.flags else {}
            store.add(row_of(row, 0, 18.0, **changes))
    report.main(["--results", str(tmp_path)])
    text = (tmp_path / "REPORT.md").read_text()
    assert text.count("\n## ") == len(tables.NAMES) and "14.3 and R@5 68.1" in text
    assert "| fastclip-v3, x2 (64 pairs, 2 ranks) | 9.5 | 1.5 | 8.0 | 1 |" in text
    for name in ("laion400m", "scaling", "step_time", "map"):
        assert f"({name}-tiny.png)" in text and (tmp_path / f"{name}-tiny.png").stat().st_size > 1000
    assert "1.00 |" in text  # two equal curves: no fewer samples


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


def test_output_that_nobody_reads_to_its_end_leaves_no_traceback():
    code = (
        "import sys\nfrom benchmarks.harness.command import exit_code_of\n"
        "sys.exit(exit_code_of(lambda: print('x' * 10**7)))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_a_refusal_of_sbatch_is_one_line(slurm, capsys):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    assert run.main(["laion400m", "--scale", "xlarge", "--seeds", "1", "--results", str(slurm / "results")]) == 2
    assert "invalid account" in capsys.readouterr().err


# --- the scores


def test_the_character_is_found_in_its_caption():
    _, pairs = dataset.choose_pairs(replace(NOISY, characters=20))
    assert [glyph_scores.name_in(pair.caption) for pair in pairs] == [pair.character.name for pair in pairs]


def test_what_ran_on_gpus_of_this_machine_is_stored_with_its_row(stand_in, monkeypatch):
    Path("mended").touch()
    rows = [replace(row, larger={"--stop-epochs": 2}) for row in tables.load("small").rows]
    monkeypatch.setattr(tables, "load", lambda name: Table("Small", "A question?", (*rows, replace(CLIP, nodes=8))))
    monkeypatch.setattr(cluster, "require_gpus_and_data", lambda scale: 2)
    monkeypatch.setenv("LOGS", "logs")
    assert run.main(["small", "--scale", "medium", "--launcher", "local", "--results", "results"]) == 0
    store = Store(Path("results"))
    found = [store.get(cluster.Job(row, "medium", 0).key) for row in rows]
    assert [(row["status"], row["machine"]["gpus"], row["tau"]) for row in found] == [(DONE, 2, 0.05)] * 2
    assert len(store.rows) == 2  # a row about 8 nodes is left to SLURM


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--seeds", "0", "choose from 1, 2, 3"), ("--seeds", "4", "choose from"), ("--jobs", "0", "is no number of 1")],
)
def test_numbers_of_runs_that_there_are_not_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["memory", "--scale", "tiny", option, value])
    assert message in capsys.readouterr().err


def test_runs_on_gpus_of_this_machine_have_the_published_global_batch(monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    job = cluster.Job(tables.load("memory").rows[1], "medium", 0)
    command = job.local_run(4).command
    args = resolved(*command[command.index("--") + 1 :])
    assert (args.batch_size, args.model, args.freeze_temperature, args.seed) == (256, "RN50", True, 2024)
    assert args.train_data == "/data/cc3m_train/{00000..00331}.tar" and args.name == job.name
    with pytest.raises(UserError, match="1024 cannot be divided among 3 GPUs"):
        job.local_run(3)


class KnowsNames:
    """A model to which a picture is the number of its character, and a caption the number of the name in it."""

    logit_scale = torch.zeros(())

    def load_state_dict(self, weights):
        assert list(weights) == ["w"]  # the prefix of DDP is gone

    def encode_image(self, numbers):
        return torch.nn.functional.one_hot(numbers, 6).float()

    encode_text = encode_image


def test_zero_shot_counts_the_pictures_whose_character_is_recognised(tmp_path, monkeypatch):
    names = ["aries", "benzene ring", "coffin", "colon sign", "infinity", "much less-than"]
    captions = [f"small red {name} framed in blue on navy" for name in names] + ["white coffin on black"] * 2
    monkeypatch.setattr(
        glyph_scores, "_tools",
        lambda: (KnowsNames(), None, lambda texts: torch.tensor([names.index(glyph_scores.name_in(t)) for t in texts])),
    )  # fmt: skip
    seen = torch.tensor([0, 1, 2, 3, 5, 5, 2, 2])  # infinity is taken for another
    monkeypatch.setattr(glyph_scores, "held_out", lambda data: (seen, captions, 6))
    (tmp_path / "dataset.json").write_text(json.dumps({"characters": names}))
    torch.save({"state_dict": {"module.w": torch.zeros(1)}}, tmp_path / "epoch_1.pt")
    found = glyph_scores.scores(tmp_path / "epoch_1.pt", tmp_path)
    assert found["zero_shot"]["top1"] == pytest.approx(100 * 5 / 6, abs=0.01)
    assert found["reported"]["image_to_text_R@1"] == pytest.approx(100 * 5 / 6, abs=0.01)
    assert set(found["tuning"]) == set(glyph_scores.RECALLS)


def test_unknown_table_is_refused():
    with pytest.raises(UserError, match="there is no table"):
        tables.load("no_such")

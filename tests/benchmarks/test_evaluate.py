"""benchmarks/evaluate.py on small data sets in clip_benchmark's layout, with labels that make the answer known.

A random model ranks the classes of each image; the label is put at a rank of choice.
"""

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from cli import INSTALLED_MODEL, TINY, run_cli  # registers the models
from make_data import image_of, make_csv, write_tar
from torch.nn.functional import normalize

pytest.importorskip("clip_benchmark", reason="clip_benchmark is missing: pip install -e '.[evaluate]'")
from benchmarks import evaluate
from benchmarks.zero_shot import scores
from benchmarks.zero_shot.tasks import DATACOMP, IMAGENET_VARIANTS, RETRIEVAL, SUITES
from open_clip_train_fastclip.errors import UserError

EVAL_SH = Path(__file__).parents[2] / "scripts" / "slurm" / "eval.sh"
MODEL = "ViT-Glyph-32"
CLASSES = [f"thing {i}" for i in range(12)]
TEMPLATES = ["a photo of a {c}.", "{c} in the snow"]
TASKS = {task.key: task for task in DATACOMP}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """epoch_1.pt of a random model in the folder of a run, as DDP and OpenCLIP leave it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "params.txt").write_text(f"model: {MODEL}\nforce_quick_gelu: False\nimage_mean: None\n")
    torch.manual_seed(0)
    weights = {f"module.{name}": value for name, value in open_clip.create_model(MODEL).state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": weights}, run / "checkpoints" / "epoch_1.pt")
    return run / "checkpoints" / "epoch_1.pt"


@pytest.fixture(scope="module")
def model(checkpoint):
    loaded, _, transform = open_clip.create_model_and_transforms(MODEL, pretrained=str(checkpoint))
    return scores.Model(loaded.eval(), transform, open_clip.get_tokenizer(MODEL), "cpu", batch_size=4, workers=0)


@torch.no_grad()
def embed(model, numbers, texts):
    """Normalised features of the images with these numbers and of the texts."""
    images = torch.stack([model.transform(image_of(number)) for number in numbers])
    return (
        normalize(model.model.encode_image(images), dim=1),
        normalize(model.model.encode_text(model.tokenizer(texts)), dim=1),
    )


def ranking(model, numbers):
    """Classes by falling similarity for every image, [n, classes]; no two of them are too near to be told apart."""
    images, texts = embed(model, numbers, [template.format(c=name) for name in CLASSES for template in TEMPLATES])
    classes = normalize(texts.view(len(CLASSES), len(TEMPLATES), -1).mean(1), dim=1)
    similarity, order = (images @ classes.T).sort(dim=1, descending=True)
    assert (similarity[:, :-1] - similarity[:, 1:]).min() > 1e-6
    return order


def png(number):
    encoded = io.BytesIO()
    image_of(number).save(encoded, "PNG")
    return encoded.getvalue()


def npy(values):
    encoded = io.BytesIO()
    np.save(encoded, np.array(values))
    return encoded.getvalue()


def write_shards(folder, samples, shards):
    """test/0.tar, ...; samples: dicts of a file's ending and content."""
    for shard in range(shards):
        mine = list(enumerate(samples))[shard::shards]
        files = [(f"s{i:07d}.{end}", content) for i, sample in mine for end, content in sample.items()]
        write_tar(folder / "test" / f"{shard}.tar", files)
    (folder / "test" / "nshards.txt").write_text(str(shards))


def make_classification(folder, model, numbers, ranks, groups=None, shards=2):
    """The label of image i has the rank ranks[i] (0: the best) in the model's eyes."""
    order = ranking(model, numbers)
    samples = [{"png": png(n), "cls": str(order[i, ranks[i]].item()).encode()} for i, n in enumerate(numbers)]
    for sample, group in zip(samples, groups or [], strict=False):
        sample["npy"] = npy([group, 7])
    write_shards(folder, samples, shards)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))


def make_retrieval(folder, numbers, captions):
    samples = [{"png": png(n), "txt": "\n".join(captions[i]).encode()} for i, n in enumerate(numbers)]
    write_shards(folder, samples, shards=1)
    (folder / "dataset_type.txt").write_text("retrieval")


@pytest.fixture(scope="module")
def variants(tmp_path_factory, model):
    """All of imagenet-variants; the k-th data set has k of 8 images right."""
    data = tmp_path_factory.mktemp("variants")
    for k, task in enumerate(IMAGENET_VARIANTS, start=1):
        name = f"wds_{task.name}" + ("_test" if k % 2 else "")
        make_classification(data / name, model, range(8 * k, 8 * k + 8), [0] * k + [1] * (8 - k))
    return data


def run(arguments, folder, capsys):
    """Exit code, the rows of the last line, and standard error, after a look at what was kept."""
    code = evaluate.main([*map(str, arguments), "--results", str(folder), "--batch-size", "3"])
    output = capsys.readouterr()
    rows = json.loads(output.out.splitlines()[-1])["rows"]
    kept = [json.loads(line) for line in (folder / "evaluate.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in row} for line, row in zip(kept, rows, strict=True)] == rows
    return code, rows, output


@pytest.mark.parametrize("workers", [0, 3])
def test_imagenet_variants(workers, variants, checkpoint, tmp_path, capsys):
    arguments = [checkpoint, "--suite", "imagenet-variants", "--data", variants, "--workers", workers]
    code, rows, output = run(arguments, tmp_path, capsys)
    assert code == 0
    assert [(row["task"], row["value"], row["samples"]) for row in rows[:-1]] == [
        (task.key, k / 8, 8) for k, task in enumerate(IMAGENET_VARIANTS, start=1)
    ]
    assert rows[-1]["kind"] == "mean" and rows[-1]["value"] == pytest.approx(0.5) and rows[-1]["lost"] == []
    assert {row["model"] for row in rows} == {MODEL}
    assert "50000" in output.out  # eight images are not the published test set, which is said


@pytest.mark.parametrize("lost", ["folder", "shard", "classnames", "torn"])
def test_no_mean_without_every_data_set(lost, variants, checkpoint, tmp_path, capsys):
    data = shutil.copytree(variants, tmp_path / "data")
    folder = TASKS["imagenet-a"].find(data)
    if lost == "folder":
        shutil.rmtree(folder)
    elif lost == "shard":
        (folder / "test" / "1.tar").unlink()
    elif lost == "classnames":
        (folder / "classnames.txt").unlink()
    else:
        shard = folder / "test" / "1.tar"
        shard.write_bytes(shard.read_bytes()[:700])
    arguments = [checkpoint, "--suite", "imagenet-variants", "--data", data, "--workers", 0]
    code, rows, output = run(arguments, tmp_path, capsys)
    assert code == 1 and rows[-1]["value"] is None and rows[-1]["lost"] == ["imagenet-a"]
    assert [row["value"] for row in rows[:-1]] == [1 / 8, 2 / 8, 3 / 8, None, 5 / 8, 6 / 8, 7 / 8]
    assert "1 of 7 tasks" in output.err and "imagenet-a" in output.err and "not formed" in output.out
    assert rows[3]["error"] and "\n" not in rows[3]["error"]


def test_retrieval(checkpoint, model, tmp_path, capsys):
    expected = []
    for task, count in zip(RETRIEVAL, (7, 5), strict=True):
        numbers = range(100 * count, 100 * count + count)
        captions = [[f"picture {n}", f"{n} is its number"][: 1 + n % 2] for n in numbers]
        make_retrieval(tmp_path / f"wds_{task.name}", numbers, captions)
        images, texts = embed(model, numbers, sum(captions, []))
        owner = torch.tensor([i for i, own in enumerate(captions) for _ in own])
        similarity = texts @ images.T
        found_image = (similarity.argmax(1) == owner).double().mean()
        found_text = (owner[similarity.argmax(0)] == torch.arange(count)).double().mean()
        expected.append((found_image + found_text).item() / 2)
    code, rows, _ = run([checkpoint, "--suite", "retrieval", "--data", tmp_path, "--workers", 0], tmp_path, capsys)
    assert code == 0 and [row["samples"] for row in rows[:-1]] == [7, 5]
    assert [row["value"] for row in rows[:-1]] == pytest.approx(expected)
    assert rows[-1]["value"] == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("wilds/fmow", 1 / 4), ("fairness/geode", 1 / 4), ("fairness/dollar_street", 1 / 2)],
)
def test_the_worst_group_counts(key, value, model, tmp_path):
    groups = [0, 0, 0, 0, 5, 5, 5, 5, 2, 2]
    ranks = [0, 0, 4, 5, 0, 4, 5, 6, 0, 0]  # right: 2/4, 1/4, 2/2; among the first five: 3/4, 2/4, 2/2
    make_classification(tmp_path, model, range(40, 50), ranks, groups)
    assert scores.evaluate(TASKS[key], tmp_path, model) == (value, 10)


def test_metrics_over_classes():
    logits = torch.eye(3)[[0, 0, 1, 1, 1]]  # predictions
    target = torch.tensor([0, 0, 0, 1, 2])
    assert scores.classification_metric("acc1", logits, target) == pytest.approx(3 / 5)
    assert scores.classification_metric("mean_per_class_recall", logits, target) == pytest.approx((2 / 3 + 1 + 0) / 3)
    # F1: class 0 has precision 1 and recall 2/3, class 1 has 1/3 and 1, class 2 is never predicted
    assert scores.classification_metric("F1-macro_all", logits, target) == pytest.approx((0.8 + 0.5 + 0) / 3)


def test_f1_is_over_the_classes_that_occur():
    logits, target = torch.eye(3)[[0, 2]], torch.tensor([0, 0])
    assert scores.classification_metric("F1-macro_all", logits, target) == pytest.approx(2 / 3)


def test_winogavil(model, tmp_path):
    samples = []
    for cue, count, right in (("Apple", 10, (0, 2)), ("tree", 12, (0, 1, 2)), ("stone", 6, (5,))):
        numbers = range(count)
        images, text = embed(model, numbers, [f"An {cue.lower()}" if cue == "Apple" else f"A {cue}"])
        order = (images @ text[0]).argsort(descending=True).tolist()
        names = [f"name {number}" for number in numbers]
        answers = {"cue": cue, "candidates": names, "associations": [names[order[rank]] for rank in right]}
        samples.append({"json": json.dumps(answers).encode()} | {f"{n}.jpg": png(n) for n in numbers})
    write_shards(tmp_path, samples, shards=1)
    prompts = []
    listening = dataclasses.replace(model, tokenizer=lambda texts: prompts.extend(texts) or model.tokenizer(texts))
    # Chosen and right share one of three for the first cue, all for the second; the third has too few candidates.
    assert scores.evaluate(TASKS["misc/winogavil"], tmp_path, listening) == (pytest.approx((1 / 3 + 1) / 2), 3)
    assert prompts == ["An apple", "A tree"]


def test_datacomp_has_38_tasks_and_names_those_that_are_missing(variants, checkpoint, tmp_path, capsys):
    assert len({task.name for task in SUITES["datacomp"]}) == 38
    code, rows, output = run([checkpoint, "--suite", "datacomp", "--data", variants, "--workers", 0], tmp_path, capsys)
    assert code == 1 and len(rows) == 39 and len(rows[-1]["lost"]) == 31
    assert "misc/winogavil" in output.err and "wds_vtab-svhn" in output.out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": "nothing.pt"}, "no such file"),
        ({"model": "ViT-B-23"}, "--model ViT-B-23 is unknown"),
        ({"model": "ViT-B-32"}, "is no checkpoint of ViT-B-32"),
        ({"data": "nowhere"}, "holds no data set of imagenet-variants"),
    ],
)
def test_wrong_input_is_one_line(changed, message, variants, checkpoint, tmp_path, capsys):
    given = {"checkpoint": checkpoint, "model": MODEL, "data": variants} | changed
    arguments = [
        given["checkpoint"],
        "--suite",
        "imagenet-variants",
        "--data",
        given["data"],
        "--model",
        given["model"],
    ]
    assert evaluate.main([*map(str, arguments), "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and error[-1].startswith("error: ")
    assert not (tmp_path / "evaluate.jsonl").exists()


def test_a_checkpoint_without_its_run_needs_a_model(variants, checkpoint, tmp_path, capsys):
    alone = shutil.copy(checkpoint, tmp_path)
    assert evaluate.main([str(alone), "--suite", "imagenet-variants", "--data", str(variants)]) == 2
    assert "add --model" in capsys.readouterr().err


def test_the_missing_package_is_named(variants, checkpoint, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "benchmarks.zero_shot.scores")
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    monkeypatch.setitem(sys.modules, "clip_benchmark.datasets.builder", None)
    assert evaluate.main([str(checkpoint), "--suite", "imagenet-variants", "--data", str(variants)]) == 2
    assert "pip install -e '.[evaluate]'" in capsys.readouterr().err


def run_batch_script(checkpoint, folder, **env):
    """eval.sh as SLURM runs it, with programs that stand in for SLURM's."""
    programs = {"scontrol": f"echo ' Command={EVAL_SH} x'", "srun": 'shift\nexec "$@"'}
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "REHEARSE": "1", "LOGS": str(folder / "logs"), "PATH": path}
    command = ["bash", str(EVAL_SH), str(checkpoint), "--batch-size", "8"]
    return subprocess.run(command, env=os.environ | job | env, capture_output=True, text=True, timeout=120, check=False)


def test_the_batch_script_evaluates_a_suite(variants, checkpoint, tmp_path):
    done = run_batch_script(checkpoint, tmp_path, SUITE="imagenet-variants", EVAL_DATA=str(variants))
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "logs" / "eval-run-epoch_1-7" / "evaluate.jsonl").read_text().splitlines()
    assert json.loads(kept[-1])["value"] == pytest.approx(0.5)


def test_the_batch_script_needs_the_data(checkpoint, tmp_path):
    done = run_batch_script(checkpoint, tmp_path, SUITE="retrieval", EVAL_DATA="")
    assert done.returncode == 2 and done.stderr.endswith("set it in cluster.env\n"), done.stderr


class Harm:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("key", ["imagenet-a", "wilds/fmow", "retrieval/flickr_1k_test_image_text_retrieval"])
def test_no_other_file_of_a_sample_is_opened(key, model, tmp_path, monkeypatch):
    """A pickle beside every image; images of a number and a class, a group or a caption."""

    def with_pickles(folder, samples, shards):
        harm = {"pyd": pickle.dumps(Harm(tmp_path / "mark")), "id": b"no number"}
        write_plain(folder, [sample | harm for sample in samples], shards)

    write_plain = write_shards
    monkeypatch.setitem(globals(), "write_shards", with_pickles)
    data = tmp_path / "data"
    if key.startswith("retrieval"):
        make_retrieval(data, range(4), [[f"picture {n}"] for n in range(4)])
    else:
        make_classification(data, model, range(4), [0, 0, 0, 1], [1, 1, 2, 2] if key == "wilds/fmow" else None)
    _, count = scores.evaluate(TASKS[key], data, model)
    assert count == 4 and not (tmp_path / "mark").exists()


SETTINGS = {  # flags of the training command, and what of the model shows them
    "siglip": ("--loss siglip", lambda model: model.logit_bias is not None),
    "image size": ("--force-image-size 64", lambda model: model.visual.image_size == (64, 64)),
    "image size in two": ("--force-image-size 64 32", lambda model: tuple(model.visual.image_size) == (64, 32)),
    "context length": ("--force-context-length 20", lambda model: model.context_length == 20),
    "quick gelu": ("--force-quick-gelu", lambda model: "QuickGELU" in str(model)),
    "custom text": ("--force-custom-text", lambda model: hasattr(model, "text")),
    "torchscript": ("--torchscript", lambda model: True),
    "patch dropout": ("--force-patch-dropout 0.5", lambda model: True),
    "mean": (
        "--image-mean 0.1 0.2 0.3 --image-std 0.5 0.5 0.5 --image-interpolation bilinear --image-resize-mode squash",
        lambda model: (
            model.visual.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]
            and model.visual.preprocess_cfg["interpolation"] == "bilinear"
            and model.visual.preprocess_cfg["resize_mode"] == "squash"
        ),
    ),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("table"), rows=8)


def trained(flags, loss, table, folder):
    """epoch_1.pt of a run."""
    command = [*TINY, *INSTALLED_MODEL, "--loss", loss, *flags.split(), "--train-data", table]
    run = run_cli([*command, "--logs", folder, "--name", "run"], folder / "out")
    assert run.ok, run
    return folder / "run" / "checkpoints" / "epoch_1.pt"


def load(checkpoint, model=None):
    return evaluate.load_model(Namespace(checkpoint=checkpoint, model=model, batch_size=1, workers=0))[1]


@pytest.mark.parametrize(
    ("loss", "setting"),
    [*(("clip", name) for name in SETTINGS), *(("fastclip-v3", name) for name in list(SETTINGS)[1:])],
)
def test_the_model_is_the_one_that_was_trained(loss, setting, table, tmp_path):
    flags, shows = SETTINGS[setting]
    checkpoint = trained(flags, loss, table, tmp_path)
    loaded = load(checkpoint)
    assert shows(loaded.model)
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[key]) for key, value in loaded.model.state_dict().items())
    embed(loaded, [1], ["a caption of some words"])  # image and text fit
    if loss == "fastclip-v3":  # which says it itself, so it may be moved; OpenCLIP's own do not
        (tmp_path / "moved").mkdir()
        assert shows(load(Path(shutil.move(checkpoint, tmp_path / "moved"))).model)


def test_another_image_size_is_not_resized_in_silence(table, tmp_path):
    """A checkpoint of OpenCLIP's losses without its params.txt."""
    checkpoint = trained("--force-image-size 64", "clip", table, tmp_path)
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(checkpoint, tmp_path / "moved")
    with pytest.raises(UserError, match="visual.positional_embedding has the shape"):
        load(Path(moved), MODEL)
    shutil.copy(tmp_path / "run" / "params.txt", tmp_path / "moved")
    assert load(Path(moved)).model.visual.image_size == (64, 64)


def test_a_checkpoint_inside_an_epoch(table, tmp_path):
    trained("--force-image-size 64 --save-every 1steps", "clip", table, tmp_path)
    (inside,) = (tmp_path / "run" / "checkpoints").glob("epoch_*/checkpoint.pt")
    assert load(inside).model.visual.image_size == (64, 64)


def test_weights_that_do_not_fit_are_named(checkpoint, tmp_path):
    weights = torch.load(checkpoint, weights_only=True)
    weights["state_dict"]["module.more"] = weights["state_dict"].pop("module.ln_final.bias")
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(UserError, match="'more'.* are not in the model, .*ln_final.bias"):
        load(tmp_path / "a.pt", MODEL)


def test_frozen_batch_norms(tmp_path):
    """Of --lock-image --lock-image-freeze-bn-stats: they have one buffer less."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": text}
    (tmp_path / "RN-Tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "RN-Tiny.json")
    trained = open_clip.create_model("RN-Tiny")
    trained.lock_image_tower(0, freeze_bn_stats=True)
    torch.save({"epoch": 1, "state_dict": trained.state_dict()}, tmp_path / "a.pt")
    locked = "lock_image: True\nlock_image_freeze_bn_stats: True\nlock_image_unlocked_groups: 0\n"
    (tmp_path / "params.txt").write_text("model: RN-Tiny\n" + locked)
    loaded = load(tmp_path / "a.pt").model
    assert loaded.state_dict().keys() == trained.state_dict().keys()

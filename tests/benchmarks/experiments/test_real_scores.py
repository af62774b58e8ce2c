"""Scores of a checkpoint on held-out real pairs, against the same worked out here from the files."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from real_folder import THEMES, make_real_folder
from scipy.optimize import minimize

from benchmarks.experiments import encoding, local_data, real_scores
from benchmarks.experiments.real_pairs import RealPairs
from benchmarks.harness.shards import read_pairs

NAMES = {name: colour for of in THEMES.values() for name, colour in of.items()}
SHARDS = 2  # of three


class SeesColours:
    """A model to which a picture is its colour, and a text the colour of what it names."""

    logit_scale = torch.zeros(())

    def to(self, device):
        return self

    def load_state_dict(self, weights):
        assert list(weights) == ["w"]  # neither the prefix of DDP nor the bias of siglip

    def encode_image(self, colours):
        return colours

    encode_text = encode_image


def colour_of(text):
    """Of what a caption or a name says, a little redder than its pictures."""
    name = next(name for name in NAMES if name in text)
    return np.array(NAMES[name]) - 120.0 + np.array([30.0, 0.0, 0.0])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read(folder, shards=None):
    """Unit vectors of a split's pictures and captions, read here."""
    colours, captions = [], []
    for path in sorted(folder.glob("*.tar"))[:shards]:
        with tarfile.open(path) as tar:
            for name in sorted(tar.getnames()):
                content = tar.extractfile(name).read()
                if name.endswith(".png"):
                    colours.append(np.asarray(Image.open(io.BytesIO(content)), dtype=float)[0, 0] - 120)
                else:
                    captions.append(colour_of(content.decode()))
    return unit(np.array(colours)), unit(np.array(captions))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of real data, and a model that sees its colours in place of a trained one."""
    make_real_folder(tmp_path / "real")

    def transform(image):
        return torch.tensor(np.asarray(image)[0, 0] - 120.0, dtype=torch.float32)

    def tokenizer(texts):
        return torch.tensor(np.array([colour_of(text) for text in texts]), dtype=torch.float32)

    monkeypatch.setattr(encoding, "tools", lambda model_name, image_size: (SeesColours(), transform, tokenizer))
    torch.save({"state_dict": {"module.w": torch.zeros(1), "module.logit_bias": torch.zeros(1)}}, tmp_path / "1.pt")
    return tmp_path / "real"


def test_recall_of_every_split(data):
    found = real_scores.scores(data.parent / "1.pt", data, SHARDS)
    for score, split in (("val", "val"), ("val_new", "val_new"), ("tuning", "tune")):
        pictures, captions = read(data / split)
        products = pictures @ captions.T
        for way, scores in (("image_to_text", products), ("text_to_image", products.T)):
            # no picture is alike another, but captions of one name are: of equal ones any may come first
            better = (scores > np.diag(scores)[:, None] + 1e-6).sum(1)
            level = (scores > np.diag(scores)[:, None] - 1e-6).sum(1)
            for k in (1, 5, 10):
                recall = found[score][f"{way}_R@{k}"]
                assert 100 * (level <= k).mean() - 0.01 <= recall <= 100 * (better < k).mean() + 0.01


def themed(data):
    """Vectors and themes of the pictures of val and val_new that have a theme."""
    labels = json.loads((data / "labels.json").read_text())["splits"]
    pictures = np.concatenate([read(data / split)[0] for split in ("val", "val_new")])
    themes = [*labels["val"]["theme"], *labels["val_new"]["theme"]]
    chosen = [place for place, theme in enumerate(themes) if theme is not None]
    return pictures[chosen], np.array([themes[place] for place in chosen])


def test_zero_shot_is_that_of_the_mean_of_the_names_of_a_theme(data):
    pictures, themes = themed(data)
    classes = unit(np.array([unit(np.array([*map(colour_of, of)])).mean(0) for of in THEMES.values()]))
    ranking = np.argsort(-(pictures @ classes.T), axis=1)
    shares = {f"top{k}": 100 * (ranking[:, :k] == themes[:, None]).any(1).mean() for k in (1, 5)}
    assert 20 < shares["top1"] < shares["top5"]  # of six themes
    assert real_scores.scores(data.parent / "1.pt", data, SHARDS)["zero_shot"] == pytest.approx(shares, abs=0.01)


@pytest.mark.parametrize("most", [5_000, 24])
def test_the_probe_is_a_logistic_regression_on_the_first_themed_pictures_of_the_run(data, monkeypatch, most):
    monkeypatch.setattr(real_scores, "PROBE_PAIRS", most)
    pictures, _ = read(data / "train", SHARDS)
    labels = json.loads((data / "labels.json").read_text())["splits"]["train"]["theme"][: len(pictures)]
    chosen = [place for place, theme in enumerate(labels) if theme is not None][:most]
    taught, themes = pictures[chosen], np.array([labels[place] for place in chosen])

    def objective(parameters):  # cross entropy summed over the pictures, and half the squared weights over C
        weights, bias = parameters[:18].reshape(3, 6), parameters[18:]
        logits = taught @ weights + bias
        top = logits.max(1, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(logits - top).sum(1))
        residual = np.exp(logits - norm[:, None]) - np.eye(6)[themes]
        gradient = np.concatenate([(taught.T @ residual + weights / real_scores.C).ravel(), residual.sum(0)])
        value = (norm - logits[np.arange(len(themes)), themes]).sum() + (weights**2).sum() / 2 / real_scores.C
        return value, gradient

    best = minimize(objective, np.zeros(24), jac=True, method="L-BFGS-B", options={"maxiter": 10_000, "ftol": 1e-14}).x
    tested, shown = themed(data)
    accuracy = 100 * ((tested @ best[:18].reshape(3, 6) + best[18:]).argmax(1) == shown).mean()
    found = real_scores.scores(data.parent / "1.pt", data, SHARDS)["linear_probe"]["theme"]
    assert found == pytest.approx(accuracy, abs=0.01)


def test_a_run_is_scored_with_its_own_model_and_image_size(tmp_path, monkeypatch):
    make_real_folder(tmp_path / "data" / "real-64", size=64)
    monkeypatch.chdir(tmp_path)
    model, transform, tokenizer = encoding.tools("ViT-Glyph-32", 64)
    torch.save({"state_dict": model.state_dict()}, "1.pt")
    data = local_data.Real(RealPairs(size=64, pairs=76, shards=SHARDS))
    flags = {"--model": "ViT-Glyph-32", "--force-image-size": 64, "--device": "cpu"}
    pictures, captions = read_pairs(sorted((data.folder / "val").glob("*.tar")))
    features = encoding.features(model.encode_image, encoding.as_images(pictures, transform))
    texts = encoding.features(model.encode_text, tokenizer(captions))
    expected = encoding.recalls(features, texts, model, real_scores.RECALLS)
    assert data.measure("1.pt", flags)["scores"]["val"] == expected
    with pytest.raises(RuntimeError, match="size mismatch"):
        data.measure("1.pt", flags | {"--force-image-size": None})

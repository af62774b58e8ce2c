"""Scores of a checkpoint on held-out real pairs: retrieval on three splits, and which theme an emoji's picture shows.

A theme is Unicode's subgroup of the emoji ("food-fruit"); other pictures have none.
"""

import json
from functools import cache
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from ..harness.shards import read_pairs
from . import encoding

RECALLS = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
SPLITS = {"val": "val", "val_new": "val_new", "tuning": "tune"}  # a score: the folder of its pairs
THEMED = ("val", "val_new")  # whose pictures with a theme are for zero-shot and probe
PROBE_PAIRS = 5_000  # most training pictures of the linear probe
# Features of unit length need a weak penalty. The same for every run: none is chosen on the pictures that are tested.
C = 100.0
MAX_ITERATIONS = 2_000  # at this C it converges in about 300


@cache
def _labels(data: Path) -> dict:
    return json.loads((data / "labels.json").read_text())


@cache
def _held_out(data: Path, split: str, model_name: str, image_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and tokens of a split."""
    _, transform, tokenizer = encoding.tools(model_name, image_size)
    pictures, captions = read_pairs(sorted((data / split).glob("*.tar")))
    return encoding.as_images(pictures, transform), tokenizer(captions)


@cache
def _probe_pictures(data: Path, shards: int, model_name: str, image_size: int | None) -> tuple[torch.Tensor, list[int]]:
    """Images of the first training pairs that have a theme, and their themes."""
    pictures, _ = read_pairs(sorted((data / "train").glob("*.tar"))[:shards])
    themes = _labels(data)["splits"]["train"]["theme"][: len(pictures)]
    chosen = [index for index, theme in enumerate(themes) if theme is not None][:PROBE_PAIRS]
    images = encoding.as_images((pictures[index] for index in chosen), encoding.tools(model_name, image_size)[1])
    return images, [themes[index] for index in chosen]


def scores(
    checkpoint: Path, data: Path, shards: int, model_name: str = encoding.MODEL, image_size: int | None = None,
    device: str = "cpu",
) -> dict:  # fmt: skip
    """{"val", "val_new", "tuning": recalls, "zero_shot": {"top1", "top5"}, "linear_probe": {"theme"}}, all in percent.

    data: a folder of benchmarks.real_data, of whose training shards the run had the first `shards`. Recall is
    OpenCLIP's own metric. Zero-shot: a theme stands for the mean of its emoji's names, over the themed pictures of val
    and val_new. Linear probe: accuracy, on the same pictures, of a regression on the run's own training pictures.
    """
    data = data.resolve()  # what is kept in memory is found by it
    model, _, tokenizer = encoding.tools(model_name, image_size)
    encoding.load_weights(model.to(device), checkpoint)
    found, tested, shown = {}, [], []
    for score, split in SPLITS.items():
        images, tokens = _held_out(data, split, model_name, image_size)
        image_features = encoding.features(model.encode_image, images, device)
        text_features = encoding.features(model.encode_text, tokens, device)
        found[score] = encoding.recalls(image_features, text_features, model, RECALLS)
        if split in THEMED:
            themes = _labels(data)["splits"][split]["theme"]
            tested.append(image_features[[theme is not None for theme in themes]])
            shown += [theme for theme in themes if theme is not None]
    names = [_labels(data)["theme_names"][theme] for theme in _labels(data)["themes"]]
    name_features = encoding.features(model.encode_text, tokenizer(sum(names, [])), device)
    means = torch.stack([part.mean(0) for part in name_features.split([len(of_theme) for of_theme in names])])
    pictures, taught = _probe_pictures(data, shards, model_name, image_size)
    probe = linear_probe(encoding.features(model.encode_image, pictures, device), taught, torch.cat(tested), shown)
    found["zero_shot"] = encoding.zero_shot(torch.cat(tested), means, shown)
    return found | {"linear_probe": {"theme": probe}}


def linear_probe(features: torch.Tensor, classes: list[int], tested: torch.Tensor, shown: list[int]) -> float:
    """Percent of `tested` [M, d] whose class a logistic regression on `features` [N, d] finds; all of unit length."""
    with threadpool_limits(1):  # other cores train
        regression = LogisticRegression(C=C, max_iter=MAX_ITERATIONS).fit(features.numpy(), classes)
        return round(100 * float(regression.score(tested.numpy(), shown)), 2)

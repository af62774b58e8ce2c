"""Scores of a checkpoint on the held-out glyph pairs: retrieval on two splits, and which character a picture shows."""

import io
import json
import logging
import re
import tarfile
from functools import cache
from pathlib import Path

import open_clip
import torch
from open_clip_train.train import get_clip_metrics
from PIL import Image

from open_clip_train_fastclip.openclip import register_models

from ..glyph_data.dataset import BACKGROUNDS, COLOURS, attribute_floor

MODEL = "ViT-Glyph-32"
REPORTED_SHARDS = 4  # the rest are for tuning
RECALLS = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")
CHUNK = 500  # images or texts encoded at a time


@cache
def _tools():
    register_models()
    logging.disable(logging.WARNING)  # of random weights: those of a checkpoint take their place
    model, _, transform = open_clip.create_model_and_transforms(MODEL)
    logging.disable(logging.NOTSET)
    return model.eval(), transform, open_clip.get_tokenizer(MODEL)


@cache
def held_out(data: Path) -> tuple[torch.Tensor, list[str], int]:
    """Images, captions and the number of those that are reported, of val/ in a folder of glyph data."""
    transform = _tools()[1]
    images, captions, reported = [], [], 0
    for number, path in enumerate(sorted((data / "val").glob("*.tar"))):
        with tarfile.open(path) as tar:
            for entry in tar:
                content = tar.extractfile(entry).read()
                if entry.name.endswith(".png"):
                    images.append(transform(Image.open(io.BytesIO(content)).convert("RGB")))
                else:
                    captions.append(content.decode())
        reported = len(captions) if number < REPORTED_SHARDS else reported
    return torch.stack(images), captions, reported


def name_in(caption: str) -> str:
    """The character's name in a whole caption."""
    colours, backgrounds = "|".join(COLOURS), "|".join(BACKGROUNDS)
    return re.fullmatch(rf"(?:small )?(?:(?:{colours}) )?(.+?)(?: framed in \w+)? on (?:{backgrounds})", caption)[1]


def floor(data: Path) -> dict:
    """Recall of knowing everything but the character, on the reported pairs (see attribute_floor)."""
    _, captions, reported = held_out(data)
    return attribute_floor([caption.replace(name_in(caption), "", 1) for caption in captions[:reported]])


@torch.no_grad()
def scores(checkpoint: Path, data: Path) -> dict:
    """{"reported": recalls, "tuning": recalls, "zero_shot": {"top1": ..., "top5": ...}}, all in percent.

    Recall is OpenCLIP's own metric; "tuning" is left out where no shard is for it. Zero-shot: a character stands for
    the mean of the captions that name it in every colour on every background; over the reported pairs.
    """
    torch.set_num_threads(1)
    model = _tools()[0]
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    images, captions, reported = held_out(data)
    image_features = _normalised(model.encode_image(chunk) for chunk in images.split(CHUNK))
    text_features = _text_features(model, captions)
    found = {}
    for split, part in (("reported", slice(reported)), ("tuning", slice(reported, None))):
        if not captions[part]:
            continue
        metrics = get_clip_metrics(image_features[part], text_features[part], model.logit_scale.exp())
        found[split] = {name: round(100 * float(metrics[name]), 2) for name in RECALLS}
    names = json.loads((data / "dataset.json").read_text())["characters"]
    prompts = [f"{colour} {name} on {ground}" for name in names for colour in COLOURS for ground in BACKGROUNDS]
    classes = _text_features(model, prompts).view(len(names), -1, image_features.shape[1]).mean(1)
    guesses = (image_features[:reported] @ _normalised([classes]).T).topk(5).indices
    shown = torch.tensor([[names.index(name_in(caption))] for caption in captions[:reported]])
    right = (guesses == shown).float().cumsum(1).mean(0)
    return found | {"zero_shot": {f"top{k}": round(100 * right[k - 1].item(), 2) for k in (1, 5)}}


def _text_features(model, captions):
    tokens = _tools()[2](captions)
    return _normalised(model.encode_text(chunk) for chunk in tokens.split(CHUNK))


def _normalised(features):
    return torch.nn.functional.normalize(torch.cat(list(features)), dim=1)

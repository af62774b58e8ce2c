"""Scores of a checkpoint on the held-out glyph pairs: retrieval on two splits, and which character a picture shows."""

import json
import re
from functools import cache
from pathlib import Path

import torch

from ..glyph_data.dataset import BACKGROUNDS, COLOURS, attribute_floor
from ..harness.shards import read_pairs
from . import encoding

REPORTED_SHARDS = 4  # the rest are for tuning
RECALLS = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")


@cache
def held_out(data: Path) -> tuple[torch.Tensor, list[str], int]:
    """Images, captions and the number of those that are reported, of val/ in a folder of glyph data."""
    shards = sorted((data / "val").glob("*.tar"))
    pictures, captions = read_pairs(shards[:REPORTED_SHARDS])
    more_pictures, more_captions = read_pairs(shards[REPORTED_SHARDS:])
    images = encoding.as_images(pictures + more_pictures, encoding.tools()[1])
    return images, captions + more_captions, len(captions)


def name_in(caption: str) -> str:
    """The character's name in a whole caption."""
    colours, backgrounds = "|".join(COLOURS), "|".join(BACKGROUNDS)
    return re.fullmatch(rf"(?:small )?(?:(?:{colours}) )?(.+?)(?: framed in \w+)? on (?:{backgrounds})", caption)[1]


def floor(data: Path) -> dict:
    """Recall of knowing everything but the character, on the reported pairs (see attribute_floor)."""
    _, captions, reported = held_out(data)
    return attribute_floor([caption.replace(name_in(caption), "", 1) for caption in captions[:reported]])


def scores(checkpoint: Path, data: Path) -> dict:
    """{"reported": recalls, "tuning": recalls, "zero_shot": {"top1": ..., "top5": ...}}, all in percent.

    Recall is OpenCLIP's own metric; "tuning" is left out where no shard is for it. Zero-shot: a character stands for
    the mean of the captions that name it in every colour on every background; over the reported pairs.
    """
    model, _, tokenizer = encoding.tools()
    encoding.load_weights(model, checkpoint)
    images, captions, reported = held_out(data)
    image_features = encoding.features(model.encode_image, images)
    text_features = encoding.features(model.encode_text, tokenizer(captions))
    found = {}
    for split, part in (("reported", slice(reported)), ("tuning", slice(reported, None))):
        if captions[part]:
            found[split] = encoding.recalls(image_features[part], text_features[part], model, RECALLS)
    names = json.loads((data / "dataset.json").read_text())["characters"]
    prompts = [f"{colour} {name} on {ground}" for name in names for colour in COLOURS for ground in BACKGROUNDS]
    prompt_features = encoding.features(model.encode_text, tokenizer(prompts))
    classes = prompt_features.view(len(names), -1, image_features.shape[1]).mean(1)
    shown = [names.index(name_in(caption)) for caption in captions[:reported]]
    return found | {"zero_shot": encoding.zero_shot(image_features[:reported], classes, shown)}

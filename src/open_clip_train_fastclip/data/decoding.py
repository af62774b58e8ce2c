"""What is decoded of a sample, by a list of what is allowed: its image, its caption and, if ids are in it, its json.

Nothing else that lies in a shard is opened. webdataset's own decoder takes every file by its ending, pickles included.
"""

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from .images import rgb

IMAGES = ("jpg", "png", "jpeg", "webp")  # endings; of several images the first of these counts, as for OpenCLIP
CAPTION, METADATA = "txt", "json"


def decode_sample(sample: dict[str, Any], with_json: bool) -> dict[str, Any]:
    """The sample with its image (RGB), caption and perhaps json decoded, and what names it; all else is left out.

    Raises what Pillow and the decoding of text raise.
    """
    decoded = {name: value for name, value in sample.items() if name.startswith("__")}
    for ending in IMAGES:
        if ending in sample:
            with Image.open(io.BytesIO(sample[ending])) as image:
                decoded[ending] = rgb(image)
            break
    decoded[CAPTION] = sample[CAPTION].decode()
    if with_json and METADATA in sample:
        decoded[METADATA] = json.loads(sample[METADATA])
    return decoded


def without_needless(samples: Iterable[dict[str, Any]], with_json: bool) -> Iterator[dict[str, Any]]:
    """The samples with the files that are not needed emptied, so that a shuffle's buffer holds their names alone."""
    needed = {*IMAGES, CAPTION, *([METADATA] if with_json else [])}
    for sample in samples:
        for name in sample.keys() - needed:
            if not name.startswith("__"):
                sample[name] = b""
        yield sample

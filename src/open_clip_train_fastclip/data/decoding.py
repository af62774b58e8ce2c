"""What is decoded of a sample, by a list of what is allowed: its image, its caption and, if ids are in it, its json.

Nothing else that lies in a shard is opened. webdataset's own decoder takes every file by its ending, pickles included.
"""

import io
import json
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


def needed_endings(with_json: bool) -> set[str]:
    """Of the files that decode_sample() may open."""
    return {*IMAGES, CAPTION, *([METADATA] if with_json else [])}

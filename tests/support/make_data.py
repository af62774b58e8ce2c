"""Tiny data sets whose samples say which they are: the image's colour and the caption both encode a number."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}


def image_of(number: int) -> Image.Image:
    """An image of one colour: the number in three digits of base 32, eight grey levels apart, which JPEG preserves."""
    return Image.new("RGB", (8, 8), (8 * (number // 1024), 8 * (number // 32 % 32), 8 * (number % 32)))


def number_of_image(pixels) -> int:
    """The number that an image [..., 3] of bytes encodes."""
    digits = np.rint(np.asarray(pixels).reshape(-1, 3).mean(0) / 8).astype(int)
    return int(digits @ (1024, 32, 1))


def caption_of(number: int) -> str:
    return f"picture number {number}"


def sample_files(number: int, key: str, kinds=("png", "txt", "json")) -> list[tuple[str, bytes]]:
    """(file name, content) of one sample, a file for each kind."""
    files = []
    for kind in kinds:
        if kind in IMAGE_FORMATS:
            encoded = io.BytesIO()
            image_of(number).save(encoded, IMAGE_FORMATS[kind])
            content = encoded.getvalue()
        else:
            text = caption_of(number) if kind == "txt" else json.dumps({"key": key, "caption": caption_of(number)})
            content = text.encode()
        files.append((f"{key}.{kind}", content))
    return files


def write_tar(path, files) -> Path:
    """A tar of (file name, content) pairs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def make_shards(folder, shards=4, per_shard=8, first=0, key="{:09d}", kinds=("png", "txt", "json"), sizes=False) -> str:
    """Shards folder/00000.tar, ... of samples numbered from `first` on; returns the pattern for --train-data.

    per_shard: samples of every shard, or a list with one entry a shard. key: format of a sample's key, filled with
    its number. sizes: also write sizes.json.
    """
    folder = Path(folder)
    counts = [per_shard] * shards if isinstance(per_shard, int) else per_shard
    number, names = first, []
    for shard, count in enumerate(counts):
        files = [f for n in range(number, number + count) for f in sample_files(n, key.format(n), kinds)]
        names.append(write_tar(folder / f"{shard:05d}.tar", files).name)
        number += count
    if sizes:
        (folder / "sizes.json").write_text(json.dumps(dict(zip(names, counts, strict=True))))
    return f"{folder}/{{00000..{len(counts) - 1:05d}}}.tar"


def make_csv(folder, rows=16) -> str:
    """A tab-separated table in OpenCLIP's default layout with one png a row; returns its path."""
    folder = Path(folder)
    lines = ["filepath\ttitle"]
    for number in range(rows):
        image_of(number).save(folder / f"{number}.png")
        lines.append(f"{folder}/{number}.png\t{caption_of(number)}")
    path = folder / "data.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)

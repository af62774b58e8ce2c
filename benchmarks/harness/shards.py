"""Folders of webdataset shards of pictures and captions, the same bytes for the same pairs."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from open_clip_train_fastclip.errors import UserError


def find_data(out: Path, is_wanted: Callable[[dict], bool]) -> dict | None:
    """dataset.json of the folder `out` if that is what is wanted, None if there is nothing.

    Raises UserError where `out` holds anything else, which is never replaced.
    """
    try:
        info = json.loads((out / "dataset.json").read_text())
        if is_wanted(info):
            return info
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no such file, or one that is not ours
        pass
    if out.exists():
        raise UserError(f"{out} exists and is not the data asked for: remove it")
    return None


def write_shards(folder: Path, pair: Callable[[int], tuple[Image.Image, str]], count: int, shards: int) -> None:
    """Writes pair(0) to pair(count - 1) as `shards` tar files of nearly equal size, and sizes.json."""
    folder.mkdir(parents=True)
    sizes = {}
    bar = tqdm(total=count, desc=f"writing {folder.name}", unit="pair", disable=None)
    for shard in range(shards):
        start, stop = (count * n // shards for n in (shard, shard + 1))
        name = f"{shard:05d}.tar"
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(start, stop):
                image, caption = pair(index)
                png = io.BytesIO()
                image.save(png, "PNG")
                _add(tar, f"{index:06d}.png", png.getvalue())
                _add(tar, f"{index:06d}.txt", caption.encode())
                bar.update()
        sizes[name] = stop - start
    bar.close()
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
    print(f"{folder.name}: {count} pairs in {shards} shards", flush=True)


def _add(tar, name, data):
    entry = tarfile.TarInfo(name)  # no time, no owner: the same bytes every time
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def read_pairs(shards: Iterable[Path]) -> tuple[list[bytes], list[str]]:
    """The files of the pictures and the captions of these shards, in their order."""
    pictures, captions = [], []
    for path in shards:
        with tarfile.open(path) as tar:
            for entry in tar:
                content = tar.extractfile(entry).read()
                if entry.name.endswith(".png"):
                    pictures.append(content)
                else:
                    captions.append(content.decode())
    return pictures, captions

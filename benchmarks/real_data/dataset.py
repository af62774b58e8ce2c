"""Image-caption pairs that people made: emoji, icons, clip art and stamps with the names, keywords and sentences that
they were given, in colour (46,592 pairs) or with the icons of one colour too (90,717). Of these the splits leave out
4,262 and 3,216, which are too like a held-out pair.

Captions have the words that the packages ship, names and keywords in lower case, hyphens in a name turned into spaces,
at most six keywords. So there are short ones ("pencil"), vague ones and wrong ones, as on the web; nothing is exchanged
on purpose.

The folder holds train/, val/ (2,000 pairs), tune/ (1,000, to choose settings on) and val_new/ (1,000, whose captions
occur nowhere else) as webdataset shards of NNNNNN.png and NNNNNN.txt with sizes.json, labels.json (set and theme of
every pair), dataset.json (settings, counts, a hash of pixels and captions), licences.md and contact_sheet.png. The
training pairs are in random order, so that the first shards are a smaller data set with the same held-out pairs.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..harness.contact_sheet import Section, contact_sheet
from ..harness.shards import find_data, write_shards
from . import captions, drawing, packages, sources, splits

PACKAGES = Path("data", "packages")
SETS = {"colour": sources.COLOUR, "all": (*sources.COLOUR, *sources.ONE_COLOUR)}
SIDES = (32, 64)  # px
CODE = (packages, captions, sources, drawing)  # what the pictures and their captions depend on
TRAIN_SHARD, HELD_OUT_SHARD = 2000, 500  # pairs, about


@dataclass(frozen=True)
class Settings:
    """What determines the data. The fields are the options of the command line."""

    sets: str = "colour"
    size: int = 32  # px, both sides
    seed: int = 0  # of the splits


class Pairs(NamedTuple):
    """Pairs as they are drawn, before they are split."""

    collections: list[str]
    captions: list[str]
    themes: list[str | None]
    pictures: np.ndarray  # uint8 [N, 64, 64, 3]


def make(out: Path, settings: Settings, folder: Path = PACKAGES) -> dict:
    """Makes the data in `out` and returns dataset.json; data with the same settings are left as they are.

    `folder` is where the packages lie, or are downloaded to. Raises UserError when `out` holds anything else, and
    where the packages cannot be had.
    """
    origin = {"settings": asdict(settings), "packages": [package.label for package in packages.PACKAGES]}
    if (info := find_data(out, lambda info: {name: info[name] for name in origin} == origin)) is not None:
        return info
    packages.fetch(folder)
    emoji = captions.read_emoji(folder)
    parts = [_drawn(folder, "colour", lambda: sources.icons(folder, sources.COLOUR, emoji))]
    parts += [_drawn(folder, "clip-art", lambda: sources.clip_art(folder))]
    parts += [_drawn(folder, "stamps", lambda: sources.stamps(folder))]
    if settings.sets == "all":
        parts += [_drawn(folder, "one-colour", lambda: sources.icons(folder, sources.ONE_COLOUR, emoji))]
    pairs = _without_copies(parts)
    places = splits.split(pairs.captions, splits.features(pairs.pictures), settings.seed, splits.SIZES)
    partial = out.with_name(out.name + ".partial")  # renamed when complete, so that half a data set is never used
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("train", "val", "tune", "val_new"):
        _write(partial / name, pairs, places[name], settings.size, TRAIN_SHARD if name == "train" else HELD_OUT_SHARD)
    info = origin | _facts(pairs, places, settings.size)
    (partial / "dataset.json").write_text(json.dumps(info, indent=1) + "\n")
    (partial / "labels.json").write_text(json.dumps(_labels(pairs, places, emoji.theme_names)) + "\n")
    (partial / "licences.md").write_text(_licences(sources.licences(folder, SETS[settings.sets])))
    titles = {
        "train": f"Training pairs: {len(places['train']):,}",
        "val": "val: pictures without a near duplicate in train",
        "val_new": "val_new: moreover captions that occur nowhere in train",
    }
    contact_sheet([Section(title, partial / name) for name, title in titles.items()]).save(
        partial / "contact_sheet.png"
    )
    partial.rename(out)
    return info


def _drawn(folder: Path, part: str, read) -> Pairs:
    """What `read` gives, drawn; kept in `folder` for the next data set made with the same code and libraries."""
    code = b"".join(Path(module.__file__).read_bytes() for module in CODE) + repr(packages.PACKAGES).encode()
    libraries = [importlib.metadata.version(name) for name in ("resvg-py", "pillow")]
    key = hashlib.sha256(code + " ".join(libraries).encode()).hexdigest()[:12]
    path = folder / "drawn" / f"{part}-{key}.npz"
    if path.is_file():
        with np.load(path) as kept:
            return Pairs(*json.loads(str(kept["words"])), kept["pictures"])
    drawings = list(read())
    drawn = list(drawing.draw_all(drawings, f"drawing {part}"))
    shown = [place for place, picture in enumerate(drawn) if picture is not None]
    left_out = len(drawings) - len(shown)
    print(f"{part}: {len(shown)} pictures; {left_out} left out that show nothing or cannot be drawn", flush=True)
    of = [drawings[place] for place in shown]
    words = [one.collection for one in of], [one.caption for one in of], [one.theme for one in of]
    pairs = Pairs(*words, np.stack([drawn[place] for place in shown]))
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, words=json.dumps(words), pictures=pairs.pictures)
    for older in path.parent.glob(f"{part}-????????????.npz"):  # of other code
        older.unlink()
    partial.rename(path)
    return pairs


def _without_copies(parts: Sequence[Pairs]) -> Pairs:
    """One of the pairs that have the same pixels and the same caption."""
    collections, texts, themes = (sum((part[field] for part in parts), []) for field in range(3))
    pictures = np.concatenate([part.pictures for part in parts])
    first: dict[tuple[str, bytes], int] = {}
    for place, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        first.setdefault((text, hashlib.sha256(picture).digest()), place)
    kept = list(first.values())
    return Pairs(*([words[place] for place in kept] for words in (collections, texts, themes)), pictures[kept])


def _picture(pixels: np.ndarray, size: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image if size == image.width else image.reduce(image.width // size)


def _write(folder: Path, pairs: Pairs, places: list[int], size: int, shard: int) -> None:
    def pair(number):
        return _picture(pairs.pictures[places[number]], size), pairs.captions[places[number]]

    write_shards(folder, pair, len(places), max(1, round(len(places) / shard)))


def _facts(pairs: Pairs, places: dict[str, list[int]], size: int) -> dict:
    """What dataset.json says of the pairs."""
    digest = hashlib.sha256()
    for name in ("train", *splits.SIZES):
        for place in places[name]:
            digest.update(_picture(pairs.pictures[place], size).tobytes() + pairs.captions[place].encode())
    seen = Counter(pairs.captions[place] for place in places["train"])
    names = {_name(text) for text in seen}
    held_out = {name: [pairs.captions[place] for place in places[name]] for name in splits.SIZES}
    return {
        "pairs_before_splitting": len(pairs.captions),
        "train_pairs": len(places["train"]),
        "val_pairs": len(places["val"]),
        "splits": {name: len(of) for name, of in places.items()},
        "captions_in_train": len(seen),
        "captions_that_occur_once": sum(count == 1 for count in seen.values()),
        "share_of_captions_seen_in_train": {
            name: sum(text in seen for text in texts) / len(texts) for name, texts in held_out.items()
        },
        "share_of_names_seen_in_train": {
            name: sum(_name(text) in names for text in texts) / len(texts) for name, texts in held_out.items()
        },
        "sets": dict(Counter(pairs.collections[place] for place in places["train"]).most_common()),
        "sha256": digest.hexdigest(),
    }


def _name(caption: str) -> str:
    return caption.split(":")[0].lower()


def _labels(pairs: Pairs, places: dict[str, list[int]], theme_names: dict[str, list[str]]) -> dict:
    """labels.json: every pair's places in `sets` and `themes` (None: no theme), in the order of the shards."""
    sets, themes = sorted(set(pairs.collections)), sorted(theme_names)
    set_place, theme_place = ({name: place for place, name in enumerate(names)} for names in (sets, themes))
    return {
        "sets": sets,
        "themes": themes,
        "theme_names": theme_names,
        "splits": {
            name: {
                "set": [set_place[pairs.collections[place]] for place in of],
                "theme": [theme_place.get(pairs.themes[place]) for place in of],
            }
            for name, of in places.items()
        },
    }


def _licences(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| what | by | licence | from |", "| --- | --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    return "# Licences of the pictures and captions\n\n" + "\n".join(lines) + "\n"

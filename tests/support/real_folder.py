"""A folder with the face of benchmarks.real_data, of pictures of one colour that stand for emoji with themes."""

import hashlib
import io
import json
import random

from make_data import write_tar
from PIL import Image

THEMES = {  # theme: names of its emoji, each with a colour of its own
    "fruit": {"red apple": (220, 20, 20), "green apple": (90, 200, 60)},
    "sky": {"sun": (250, 220, 40), "cloud": (200, 220, 240), "night": (10, 10, 60)},
    "plant": {"cactus": (20, 120, 40), "rose": (240, 60, 140)},
    "drink": {"coffee": (90, 50, 20), "tea": (190, 150, 60)},
    "game": {"dice": (240, 240, 240), "joker": (130, 20, 160)},
    "sound": {"bell": (220, 170, 0), "drum": (180, 60, 20)},
}
SIZES = {"train": [40, 36, 30], "val": [12, 12], "tune": [12], "val_new": [12]}


def make_real_folder(folder, sizes=SIZES, size=32) -> dict:
    """Writes the folder and returns its dataset.json. Every fourth picture is of no emoji, and so without a theme."""
    rng = random.Random(0)
    named = [(theme, name, colour) for theme, of in THEMES.items() for name, colour in of.items()]
    splits = {}
    for split, counts in sizes.items():
        splits[split] = {"set": [], "theme": []}
        for shard, count in enumerate(counts):
            files = []
            for index in range(count):
                theme, name, colour = rng.choice(named)
                is_emoji = index % 4 != 3
                splits[split]["set"].append(0 if is_emoji else 1)
                splits[split]["theme"].append(list(THEMES).index(theme) if is_emoji else None)
                png = io.BytesIO()
                shade = tuple(min(255, max(0, part + rng.randint(-9, 9))) for part in colour)
                Image.new("RGB", (size, size), shade).save(png, "PNG")
                caption = f"{name}: picture {split} {index}" if is_emoji else f"drawing of a {name}"
                files += [(f"{index:06d}.png", png.getvalue()), (f"{index:06d}.txt", caption.encode())]
            write_tar(folder / split / f"{shard:05d}.tar", files)
        names = {f"{shard:05d}.tar": count for shard, count in enumerate(counts)}
        (folder / split / "sizes.json").write_text(json.dumps(names))
    labels = {"themes": list(THEMES), "theme_names": {theme: list(of) for theme, of in THEMES.items()}}
    (folder / "labels.json").write_text(json.dumps(labels | {"sets": ["emoji", "drawings"], "splits": splits}))
    info = {
        "settings": {"sets": "colour", "size": size, "seed": 0},
        "train_pairs": sum(sizes["train"]),
        "sha256": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.glob("*/*.tar")))).hexdigest(),
        "splits": {split: sum(counts) for split, counts in sizes.items()},
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return info

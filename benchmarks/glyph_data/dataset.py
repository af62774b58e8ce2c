"""Small image-caption data made on the spot: Unicode characters in named colours, with their Unicode names as captions.

"small red greek small letter lambda framed in blue on navy" is a 32x32 picture of a small red lambda. Size, colour,
frame and background are in the caption; the font, a turn of up to 4 degrees and a shift of up to 1 px are not. Bright
colours stand on dark backgrounds: any colour on any other is barely learned at this size.

A share of the training captions (`--mismatched`, default 0.3) is exchanged at random among their images, as web
captions are wrong now and then. `--partial` shortens a share of the training captions: the character's name and each
of the other parts with a chance of one half, after filler words. `--long-tail S` gives the r-th character training
pairs in proportion to r^-S. Validation captions are all right and whole, and none occurs in the training data.

The folder holds train/ and val/ (webdataset shards of NNNNNN.png and NNNNNN.txt, with sizes.json), dataset.json
(settings, counts, the floor of `attribute_floor`, a hash of the shards) and contact_sheet.png. The same settings give
the same bytes.
"""

import hashlib
import itertools
import json
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from open_clip_train_fastclip.errors import UserError

from ..harness.contact_sheet import Section, contact_sheet
from ..harness.shards import find_data, write_shards
from .captions import Look, Pair, attribute_floor, exchange, shorten
from .characters import choose_characters, draw_ink, load_fonts, scale_to

COLOURS = {
    "red": (255, 60, 60), "yellow": (255, 225, 50), "green": (60, 220, 70),
    "blue": (90, 160, 255), "white": (255, 255, 255), "pink": (255, 140, 215),
}  # fmt: skip
FRAMES = ("red", "yellow", "green", "blue", "white")
BACKGROUNDS = {"black": (0, 0, 0), "navy": (0, 0, 105), "maroon": (100, 0, 20), "purple": (70, 0, 110)}
CANVAS = 64  # px at which a picture is drawn; halved at the end
FRAME_BOX, FRAME_WIDTH = (3, 3, 60, 60), 4  # px of the canvas
LARGE, SMALL = 44, 26  # px of the canvas, the longer side of the character's ink
MAX_TURN, MAX_SHIFT = 4.0, 2  # degrees; px of the canvas


@dataclass(frozen=True)
class Settings:
    """What determines the data. The fields are the options of the command line."""

    seed: int = 0
    characters: int = 150
    train_per_character: int = 30
    val_per_character: int = 16
    mismatched: float = 0.3  # share of the training captions exchanged among themselves, 0 to 1
    partial: float = 0.0  # share of the training captions that say only some of what is seen, 0 to 1
    long_tail: float = 0.0  # exponent by which the number of training pairs falls with a character's rank
    train_shards: int = 16
    val_shards: int = 4
    fonts: list[str] = field(default_factory=list)  # font files or folders besides the fonts that ship with matplotlib

    def __post_init__(self):
        for name in ("characters", "train_per_character", "val_per_character", "train_shards", "val_shards"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be 1 or more")
        if not 0 <= self.partial <= 1:
            raise UserError(f"--partial {self.partial}: give a share from 0 to 1")
        if not self.long_tail >= 0:
            raise UserError(f"--long-tail {self.long_tail}: give an exponent of 0 or more")


def draw(pair: Pair, rng: random.Random) -> Image.Image:
    """The 32x32 RGB picture of a pair; `rng` picks what the caption does not say: font, turn and shift."""
    look = pair.look
    ink = scale_to(draw_ink(pair.character.text, rng.choice(pair.character.fonts)), SMALL if look.small else LARGE)
    if look.colour:
        tinted = Image.new("RGBA", ink.size, COLOURS[look.colour])
        tinted.putalpha(ink.getchannel("A"))
        ink = tinted
    ink = ink.rotate(rng.uniform(-MAX_TURN, MAX_TURN), Image.Resampling.BICUBIC, expand=True)
    shift = [rng.randint(-MAX_SHIFT, MAX_SHIFT) for _ in range(2)]
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUNDS[look.background])
    if look.frame:
        ImageDraw.Draw(image).rectangle(FRAME_BOX, outline=COLOURS[look.frame], width=FRAME_WIDTH)
    image.paste(ink, tuple((CANVAS - side) // 2 + move for side, move in zip(ink.size, shift, strict=True)), ink)
    return image.reduce(2)


def choose_pairs(settings: Settings) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs in random order. Every caption of the two together is unique."""
    forbidden = {*COLOURS, *BACKGROUNDS}
    characters = choose_characters(load_fonts(settings.fonts), settings.characters, settings.seed, forbidden)
    counts = train_counts(settings)
    train, val = [], []
    for character, count in zip(characters, counts, strict=True):
        colours = [None] if character.coloured else list(COLOURS)
        looks = [Look(*x) for x in itertools.product(colours, BACKGROUNDS, (False, True), (None, *FRAMES))]
        wanted = count + settings.val_per_character
        if wanted > len(looks):
            raise UserError(f"{wanted} renderings a character: {character.name} has only {len(looks)} captions")
        looks = random.Random(f"{settings.seed}/{character.name}").sample(looks, wanted)
        train += [Pair(character, look) for look in looks[:count]]
        val += [Pair(character, look) for look in looks[count:]]
    for name, pairs in (("train", train), ("val", val)):
        random.Random(f"{settings.seed}/{name}").shuffle(pairs)
    return train, val


def train_counts(settings: Settings) -> list[int]:
    """Training pairs of each character, `train_per_character` on average and at least one."""
    weights = [rank**-settings.long_tail for rank in range(1, settings.characters + 1)]
    scale = settings.characters * settings.train_per_character / sum(weights)
    return [max(1, round(scale * weight)) for weight in weights]


def make(out: Path, settings: Settings) -> dict:
    """Makes the data in folder `out` and returns dataset.json; data with the same settings are left as they are.

    Raises UserError when `out` holds anything else, or a setting is out of range.
    """
    if (info := find_data(out, lambda info: Settings(**info["settings"]) == settings)) is not None:
        return info
    train, val = choose_pairs(settings)
    right = shorten(train, settings.partial, settings.seed)
    captions = exchange(right, settings.mismatched, settings.seed)
    wrong = [a != b for a, b in zip(right, captions, strict=True)]
    partial = out.with_name(out.name + ".partial")  # renamed when complete, so that half a data set is never used
    shutil.rmtree(partial, ignore_errors=True)

    def drawn(pair: Pair) -> Image.Image:
        # The picture depends on the pair alone: the same under any share of exchanged captions.
        return draw(pair, random.Random(f"{settings.seed}/{pair.caption}"))

    write_shards(partial / "train", lambda i: (drawn(train[i]), captions[i]), len(train), settings.train_shards)
    write_shards(partial / "val", lambda i: (drawn(val[i]), val[i].caption), len(val), settings.val_shards)
    info = {
        "settings": asdict(settings),
        "train_pairs": len(train),
        "mismatched_pairs": sum(wrong),
        "val_pairs": len(val),
        "floor": attribute_floor([pair.look for pair in val]),
        "sha256": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(partial.glob("*/*.tar")))).hexdigest(),
        "characters": sorted(pair.character.name for pair in {p.character: p for p in val}.values()),
    }
    (partial / "dataset.json").write_text(json.dumps(info, indent=1) + "\n")
    red = {place for place, is_wrong in enumerate(wrong) if is_wrong}
    sections = [
        Section(f"Training pairs: {len(red)} of {len(train)} captions are exchanged (red)", partial / "train", red),
        Section("Validation pairs: every caption is right", partial / "val"),
    ]
    contact_sheet(sections).save(partial / "contact_sheet.png")
    partial.rename(out)
    return info

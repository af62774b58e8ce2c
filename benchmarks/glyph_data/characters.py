"""Which Unicode characters the glyph data show, and the shape of each in each font."""

import random
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

from open_clip_train_fastclip.errors import UserError

SHIPPED_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
)  # fmt: skip
MAX_NAME_WORDS = 6  # longer names do not fit the small text model's context
INK_SIZE = 109  # px at which a character is drawn before it is scaled; the one size of colour bitmap fonts
COMPARE_SIZE = 32  # px of the box in which two shapes are compared
SAME_SHAPE = 0.1  # two characters whose ink differs by less than this share are one character


@dataclass(frozen=True)
class Font:
    """One font file. `family` joins its cuts; `coloured` fonts (emoji) bring colours of their own."""

    path: Path
    family: str
    coloured: bool
    codes: frozenset  # code points it can draw


@dataclass(frozen=True)
class Character:
    """A character to show: its lower-case Unicode name and the fonts that draw it."""

    text: str
    name: str
    fonts: tuple[Font, ...]

    @property
    def coloured(self) -> bool:
        """Whether it is an emoji with colours of its own."""
        return self.fonts[0].coloured


def load_fonts(extra: Iterable[str] = ()) -> list[Font]:
    """The fonts that ship with matplotlib, and `extra` font files or folders. Raises UserError for unreadable ones."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    paths = [folder / f"{name}.ttf" for name in SHIPPED_FONTS]
    for source in map(Path, extra):
        found = sorted(p for p in source.rglob("*") if p.suffix in (".ttf", ".otf")) if source.is_dir() else [source]
        if not found:
            raise UserError(f"--fonts {source}: no .ttf or .otf file in this folder")
        paths += found
    return [_load_font(path) for path in paths]


def _load_font(path: Path) -> Font:
    try:
        family = ImageFont.truetype(str(path), INK_SIZE).getname()[0]
        with TTFont(path, lazy=True) as table:
            return Font(path, family, "CBDT" in table, frozenset(table.getBestCmap() or ()))
    except (OSError, TTLibError) as error:
        raise UserError(f"font {path} cannot be read ({error}): name a .ttf or .otf file") from None


def choose_characters(fonts: list[Font], count: int, seed: int, forbidden: set[str]) -> list[Character]:
    """`count` characters drawn by seed; no two look alike.

    Eligible is a character that at least two font families draw, or a coloured font. `forbidden` holds the words of
    which no name may contain one (the captions' own colours). Raises UserError if there are fewer than `count`.
    """
    pool = [c for c in _pool(fonts) if not forbidden & set(c.name.replace("-", " ").split())]
    random.Random(f"{seed}/characters").shuffle(pool)
    chosen, shapes = [], []
    for candidate in pool if count <= len(pool) else ():
        if len(chosen) == count:
            break
        shape = {font.path: _compare_shape(candidate.text, font) for font in candidate.fonts}
        if any(s is None for s in shape.values()) or any(_look_alike(shape, other) for other in shapes):
            continue
        chosen.append(candidate)
        shapes.append(shape)
    if len(chosen) < count:
        raise UserError(f"--characters {count}: the fonts draw too few characters that differ; lower it or add --fonts")
    return chosen


def _pool(fonts):
    plain, coloured = [f for f in fonts if not f.coloured], [f for f in fonts if f.coloured]
    for code in sorted(frozenset().union(*(f.codes for f in fonts))):
        name = unicodedata.name(chr(code), "").lower()
        if not name or len(name.split()) > MAX_NAME_WORDS or name.startswith("small") or not _is_own_shape(code):
            continue
        having = tuple(f for f in plain if code in f.codes)
        if len({f.family for f in having}) >= 2:
            yield Character(chr(code), name, having)
        elif emoji := tuple(f for f in coloured if code in f.codes):
            yield Character(chr(code), name, emoji[:1])


def _is_own_shape(code: int) -> bool:
    """Whether a character has a shape that survives being cut out and scaled.

    Box drawings, blocks and Braille mean a position in their cell; marks, modifiers and compatibility forms (fullwidth,
    superscript, mathematical bold, ...) are another character's shape.
    """
    category = unicodedata.category(chr(code))
    if category[0] not in "LNPS" or category in ("Lm", "Sk") or unicodedata.decomposition(chr(code)).startswith("<"):
        return False
    return not (0x2500 <= code <= 0x259F or 0x2800 <= code <= 0x28FF)


@cache
def draw_ink(text: str, font: Font) -> Image.Image | None:
    """The character alone, cropped to its ink: RGBA, white on transparent or in the font's colours; None if blank."""
    # Basic layout: the same result with and without the optional raqm library.
    face = ImageFont.truetype(str(font.path), INK_SIZE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(text)
    image = Image.new("RGBA", (max(1, right - left) + 8, max(1, bottom - top) + 8))
    pen = ImageDraw.Draw(image)
    pen.text((4 - left, 4 - top), text, fill="white", font=face, embedded_color=font.coloured)
    box = image.getchannel("A").getbbox()
    return image.crop(box) if box else None


def scale_to(image: Image.Image, side: int) -> Image.Image:
    """The image scaled so that its longer side has `side` pixels."""
    factor = side / max(image.size)
    return image.resize([max(1, round(length * factor)) for length in image.size], Image.Resampling.LANCZOS)


def _compare_shape(text: str, font: Font) -> np.ndarray | None:
    ink = draw_ink(text, font)
    if ink is None:
        return None
    ink = scale_to(ink, COMPARE_SIZE)
    canvas = Image.new("RGBA", (COMPARE_SIZE, COMPARE_SIZE))
    canvas.paste(ink, ((COMPARE_SIZE - ink.width) // 2, (COMPARE_SIZE - ink.height) // 2))
    alpha = np.asarray(canvas, np.float32) / 255
    return alpha[..., :3] * alpha[..., 3:] if font.coloured else alpha[..., 3]


def _look_alike(one: dict, other: dict) -> bool:
    """Whether two characters coincide in any font that draws both."""
    return any(
        np.abs(one[path] - other[path]).sum() < SAME_SHAPE * (one[path].sum() + other[path].sum())
        for path in one.keys() & other.keys()
    )

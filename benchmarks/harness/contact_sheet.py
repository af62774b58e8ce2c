"""One picture that shows what is in a folder of image-caption pairs."""

import io
import itertools
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .shards import read_pairs

COLUMNS, ROWS = 10, 4  # of a section
TILE, PICTURE, MARGIN = 132, 96, 18  # px; at most of a picture's side, which is enlarged by a whole factor; px
TEXT_LINES, LINE = 5, 13  # lines under a picture, px a line
PAPER, TEXT, WRONG = (250, 250, 250), (40, 40, 40), (200, 30, 30)


class Section(NamedTuple):
    """The first pairs of a folder of shards. The captions at the places in `wrong` are red."""

    title: str
    folder: Path
    wrong: Collection[int] = ()


def contact_sheet(sections: list[Section]) -> Image.Image:
    """The sections one below the other: 40 pairs each, the caption under its picture."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    body = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 10, layout_engine=ImageFont.Layout.BASIC)
    head = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), 15, layout_engine=ImageFont.Layout.BASIC)
    row = PICTURE + TEXT_LINES * LINE + MARGIN
    height = 2 * MARGIN + 20 + ROWS * row
    sheet = Image.new("RGB", (COLUMNS * TILE + 2 * MARGIN, len(sections) * height + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, section in enumerate(sections):
        top = MARGIN + n * height
        pen.text((MARGIN, top), section.title, fill=TEXT, font=head)
        for i, (image, caption) in enumerate(itertools.islice(pairs(section.folder), COLUMNS * ROWS)):
            x, y = MARGIN + i % COLUMNS * TILE, top + MARGIN + 20 + i // COLUMNS * row
            side = PICTURE // image.width * image.width
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
            for j, line in enumerate(textwrap.wrap(caption, 20)[:TEXT_LINES]):
                colour = WRONG if i in section.wrong else TEXT
                pen.text((x, y + PICTURE + 4 + j * LINE), line, fill=colour, font=body)
    return sheet


def pairs(folder: Path) -> Iterator[tuple[Image.Image, str]]:
    """RGB pictures and captions of a folder's shards, in their order."""
    for path in sorted(folder.glob("*.tar")):
        for picture, caption in zip(*read_pairs([path]), strict=True):
            yield Image.open(io.BytesIO(picture)).convert("RGB"), caption

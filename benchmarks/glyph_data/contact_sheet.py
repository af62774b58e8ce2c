"""One picture that shows what is in a folder of glyph data."""

import io
import itertools
import tarfile
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 10, 4  # of each of the two halves
TILE, SCALE, MARGIN = 132, 3, 18  # px; enlargement of the pictures; px
TEXT_LINES, LINE = 5, 13  # lines under a picture, px a line
PAPER, TEXT, WRONG = (250, 250, 250), (40, 40, 40), (200, 30, 30)


def contact_sheet(folder: Path, wrong: list[bool]) -> Image.Image:
    """The first training and validation pairs of `folder` with their captions; those that are `wrong` in red."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    body = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 10, layout_engine=ImageFont.Layout.BASIC)
    head = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), 15, layout_engine=ImageFont.Layout.BASIC)
    row = 32 * SCALE + TEXT_LINES * LINE + MARGIN
    half = 2 * MARGIN + 20 + ROWS * row
    sheet = Image.new("RGB", (COLUMNS * TILE + 2 * MARGIN, 2 * half + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    titles = {
        "train": f"Training pairs: {sum(wrong)} of {len(wrong)} captions are exchanged (red)",
        "val": "Validation pairs: every caption is right",
    }
    for n, (name, title) in enumerate(titles.items()):
        top = MARGIN + n * half
        pen.text((MARGIN, top), title, fill=TEXT, font=head)
        for i, (image, caption) in enumerate(itertools.islice(_pairs(folder / name), COLUMNS * ROWS)):
            x, y = MARGIN + i % COLUMNS * TILE, top + MARGIN + 20 + i // COLUMNS * row
            sheet.paste(image.resize((32 * SCALE, 32 * SCALE), Image.Resampling.NEAREST), (x, y))
            for j, line in enumerate(textwrap.wrap(caption, 20)[:TEXT_LINES]):
                colour = WRONG if name == "train" and wrong[i] else TEXT
                pen.text((x, y + 32 * SCALE + 4 + j * LINE), line, fill=colour, font=body)
    return sheet


def _pairs(folder):
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = iter(tar)
            for picture, caption in zip(members, members, strict=True):  # a picture, its caption, the next picture
                image = Image.open(io.BytesIO(tar.extractfile(picture).read()))
                yield image.convert("RGB"), tar.extractfile(caption).read().decode()

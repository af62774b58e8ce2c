"""Drawings as pictures of 64 x 64 px, on all cores."""

import io
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from .sources import CLIP_ART, STAMPS, Drawing

SIDE = 64  # px
DETAIL = 4  # times as large is clip art drawn before it is cropped to its ink and reduced
DPI = 90.0  # that of the Open Clip Art Library's millimetres
PAPER = 250  # lightness from which a pixel counts as paper
FAINT = 245  # a picture whose darkest channel is above shows nothing
CHUNK = 64  # drawings that a process takes at a time


def draw(drawing: Drawing) -> np.ndarray | None:
    """uint8 [64, 64, 3] on white, the sides' ratio kept; None for a file that cannot be drawn or shows nothing.

    An icon fills its own box; clip art and stamps, whose paper is of any size, are cropped to what is drawn.
    """
    try:
        image = _rendered(drawing)
    except (ValueError, OSError):  # of resvg; of Pillow
        return None
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    image = paper.convert("RGB")
    if not _is_icon(drawing):
        image = image.crop(image.convert("L").point(lambda light: 255 * (light < PAPER)).getbbox())
    scale = SIDE / max(image.size)
    if scale != 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    picture.paste(image, tuple((SIDE - side) // 2 for side in image.size))
    pixels = np.asarray(picture)
    return pixels if pixels.min() <= FAINT else None


def _is_icon(drawing: Drawing) -> bool:
    return drawing.collection not in (CLIP_ART, STAMPS)


def _rendered(drawing: Drawing) -> Image.Image:
    if drawing.suffix == ".png":
        image = Image.open(io.BytesIO(drawing.content))
    else:
        svg, side = drawing.content.decode(errors="replace"), {"width": DETAIL * SIDE}
        if _is_icon(drawing):
            width, height = (float(value) for value in re.search(r'width="([\d.]+)" height="([\d.]+)"', svg).groups())
            side = {"width": SIDE} if width >= height else {"height": SIDE}
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, dpi=DPI, **side)
        image = Image.open(io.BytesIO(bytes(png)))
    image = image.convert("RGBA")
    if max(image.size) > 2 * DETAIL * SIDE:
        image.thumbnail((DETAIL * SIDE, DETAIL * SIDE), Image.Resampling.BOX)
    return image


def draw_all(drawings: Sequence[Drawing], label: str) -> Iterator[np.ndarray | None]:
    """`draw` of each, in order, with a bar of that label."""
    pool = ProcessPoolExecutor()
    # A Ctrl-C reaches every process of the terminal. This one ends the others, which map starts, with the signal
    # blocked: one that died with a task in hand would be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            drawn = pool.map(draw, drawings, chunksize=CHUNK)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield from tqdm(drawn, desc=label, total=len(drawings), unit="picture", disable=None)
    finally:
        pool.shutdown(cancel_futures=True)

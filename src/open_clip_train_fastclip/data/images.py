"""Images of more than 8 bits a channel, scaled to 8 bits: Pillow's own conversion to RGB clips them to white."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import UserError, named_line

SIXTEEN_BITS = 2**16 - 1
FORMATS_OF_16_BITS = ("PNG", "PPM")  # what they hold in mode I, Pillow's 32 bits, is of 16


def in_8_bits(image: Image.Image) -> Image.Image:
    """The image itself, unless its mode is I;16, I or F: then its content in mode L.

    16 bits lose their lower 8. Floats within [0, 1] are scaled by 255. Numbers of 32 bits and floats that are within
    [0, 255] already stay as Pillow converts them, and larger integers are taken for 16 bits. Raises ValueError for
    values beyond, whose range nobody knows.
    """
    if image.mode.startswith("I;16"):
        return _upper_byte(np.asarray(image))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if image.mode == "I" and 0 <= low and high <= SIXTEEN_BITS:
        return _upper_byte(values) if high > 255 or image.format in FORMATS_OF_16_BITS else image
    if image.mode == "F" and 0 <= low and high <= 1:
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode == "F" and 0 <= low and high <= 255:
        return image
    raise ValueError(
        f"its pixels go from {low:g} to {high:g}, and of mode {image.mode} [0, 255], "
        f"{'[0, 65535]' if image.mode == 'I' else '[0, 1]'} are known: save it in 8 bits"
    )


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits a channel. Raises ValueError as in_8_bits()."""
    return in_8_bits(image).convert("RGB")


def open_in_8_bits(path: str) -> Image.Image:
    """The image of a file, in its own mode unless that has more than 8 bits. Raises ValueError as in_8_bits()."""
    return in_8_bits(Image.open(path))


def open_rgb(path: str) -> Image.Image:
    """The image of a file in RGB; a loader of images as torchvision takes it. Raises UserError that names the file."""
    try:
        with Image.open(path) as image:
            return rgb(image)
    except Exception as error:  # what Pillow raises for a bad file is not one kind
        raise UserError(f"image {path} cannot be read ({named_line(error)}): get it again, or take it out") from None


def _upper_byte(values: npt.NDArray[np.generic]) -> Image.Image:
    return Image.fromarray((values.astype(np.int32) >> 8).astype(np.uint8))

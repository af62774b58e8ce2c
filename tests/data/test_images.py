"""Images of 16 bits and of floats keep their content; all others are converted as Pillow does it."""

import io

import numpy as np
import pytest
from PIL import Image

from open_clip_train_fastclip.data.images import in_8_bits, open_rgb, rgb

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
EXPECTED = np.asarray(Image.fromarray(GREY).convert("RGB"))


def stored(image, kind, **options):
    """The image as it comes back from a file."""
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return Image.open(io.BytesIO(encoded.getvalue()))


def pgm(values, highest, code):
    header = f"P5 {values.shape[1]} {values.shape[0]} {highest}\n".encode()
    return Image.open(io.BytesIO(header + values.astype(code).tobytes()))


DEEP = {
    "png": lambda: stored(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "png, dark": lambda: stored(Image.fromarray(GREY.astype(np.uint16) * 256), "PNG"),
    "tiff": lambda: stored(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "big endian": lambda: Image.fromarray(GREY.astype(">u2") * 257),
    "32 bits": lambda: stored(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
    "32 bits that hold 8": lambda: stored(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "pgm": lambda: pgm(GREY.astype(np.uint16) * 257, 65535, ">u2"),
    "floats to 1": lambda: stored(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
    "floats to 255": lambda: stored(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("image", DEEP.values(), ids=DEEP)
def test_deep_images_are_the_same_in_8_bits(image):
    assert np.array_equal(np.asarray(rgb(image())), EXPECTED)


@pytest.mark.parametrize("dark", [np.uint16, np.int32], ids=["I;16", "I"])
def test_a_dark_image_of_16_bits_stays_dark(dark):
    """By the depth of its file, not by its brightest pixel."""
    image = pgm(np.full((4, 4), 200, dark), 65535, ">u2")
    assert np.asarray(rgb(image)).max() == 0


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 256.0], [0.0, np.nan], [np.inf, 0.0]])
def test_floats_of_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match=r"its pixels go from .* save it in 8 bits"):
        rgb(Image.fromarray(np.array([values], np.float32)))


@pytest.mark.parametrize("values", [[-1, 1], [0, 65536]])
def test_integers_of_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match="save it in 8 bits"):
        rgb(Image.fromarray(np.array([values], np.int32)))


def plain():
    image = Image.fromarray(COLOURS)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(GREY))
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned
    yield "RGB", stored(image, "PNG")
    yield "L", stored(image.convert("L"), "PNG")
    yield "LA", stored(alpha.convert("LA"), "PNG")
    yield "RGBA", stored(alpha, "PNG")
    yield "RGBA webp", stored(alpha, "WEBP", lossless=True)
    yield "P", stored(palette, "PNG")
    yield "P, transparent", stored(palette, "PNG", transparency=3)
    yield "RGB, transparent", stored(image, "PNG", transparency=(0, 0, 255))
    yield "1", stored(image.convert("1"), "PNG")
    yield "CMYK", stored(image.convert("CMYK"), "JPEG")
    yield "L jpeg", stored(image.convert("L"), "JPEG")
    yield "EXIF", stored(image, "JPEG", exif=exif)
    yield "gif", stored(palette, "GIF")


@pytest.mark.parametrize("image", [pytest.param(image, id=name) for name, image in plain()])
def test_other_images_are_converted_as_ever(image):
    assert in_8_bits(image) is image
    assert np.array_equal(np.asarray(rgb(image)), np.asarray(image.convert("RGB")))
    assert rgb(image).size == image.size


def test_a_file(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_rgb(str(tmp_path / "deep.png"))), EXPECTED)

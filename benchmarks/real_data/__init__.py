"""Image-caption pairs that people made, from npm and Debian packages. Run it to make a folder of them."""

from pathlib import Path


def usual_folder(sets: str, size: int) -> Path:
    """Where the data of these settings lie if nobody says otherwise."""
    return Path("data", "real" + ("" if sets == "colour" else f"-{sets}") + ("" if size == 32 else f"-{size}"))

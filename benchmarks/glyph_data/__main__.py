"""Makes a folder of glyph data.

    python -m benchmarks.glyph_data --out data/glyphs

dataset.py says what is in it. The same settings are left as they are; a folder with anything else is refused.
"""

import argparse
import sys
from pathlib import Path

from ..harness.command import exit_code_of
from .dataset import Settings, make


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.glyph_data",
        description="Pictures of Unicode characters with captions, as webdataset.",
    )
    defaults = Settings()
    parser.add_argument("--out", type=Path, default=Path("data/glyphs"), help="folder to make (default: %(default)s)")
    helps = {
        "seed": "seed of everything drawn at random",
        "characters": "number of different characters",
        "train_per_character": "training pairs of each character",
        "val_per_character": "validation pairs of each character",
        "mismatched": "share of the training captions exchanged among themselves, 0 to 1",
        "partial": "share of the training captions that say only some of what is seen, 0 to 1",
        "long_tail": "exponent by which the number of training pairs falls with a character's rank",
        "train_shards": "number of training shards; at least data loader workers x ranks",
        "val_shards": "number of validation shards",
    }
    for name, text in helps.items():
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--fonts", nargs="*", default=[], metavar="PATH",
        help="more fonts: .ttf or .otf files or folders of them, Noto Color Emoji too (default: those of matplotlib)",
    )  # fmt: skip
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    return exit_code_of(lambda: run(out, args))


def run(out: Path, settings: dict) -> int:
    """Makes the data and says what they are. Raises UserError."""
    info = make(out, Settings(**settings))
    print(
        f"{out}: {info['train_pairs']} training pairs, {info['mismatched_pairs']} of them with a wrong caption, "
        f"{info['val_pairs']} validation pairs; see {out}/contact_sheet.png"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes a folder of real image-caption pairs: downloads 0.3 GB of packages once, then draws.

    python -m benchmarks.real_data --out data/real

dataset.py says what is in it. The same settings are left as they are; a folder with anything else is refused.
"""

import argparse
import sys
from pathlib import Path

from ..harness.command import exit_code_of
from . import usual_folder
from .dataset import PACKAGES, SETS, SIDES, Settings, make


def run(args) -> int:
    """Makes the data and says what they are. Raises UserError."""
    settings = Settings(args.sets, args.size, args.seed)
    out = args.out or usual_folder(settings.sets, settings.size)
    counts = ", ".join(f"{count:,} {name}" for name, count in make(out, settings, args.packages)["splits"].items())
    print(f"{out}: {counts}; see {out}/contact_sheet.png and licences.md")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_data",
        description="Emoji, icons, clip art and stamps with the words that people gave them, as webdataset.",
    )
    defaults = Settings()
    parser.add_argument(
        "--out", type=Path, help="folder to make (default: data/real; -all and -64 are added to that for these)"
    )
    parser.add_argument(
        "--sets", choices=tuple(SETS), default=defaults.sets,
        help="colour: 42,330 pairs; all: with icons of one colour, 87,501 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, choices=SIDES, default=defaults.size, help="px (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the splits (default: %(default)s)")
    parser.add_argument(
        "--packages", type=Path, default=PACKAGES, metavar="FOLDER",
        help="where the packages and what is drawn of them are kept (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return exit_code_of(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

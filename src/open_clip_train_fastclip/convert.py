"""Turn a checkpoint of the authors' released code into a pair that this package resumes from.

    python -m open_clip_train_fastclip.convert RELEASED.pt CHECKPOINTS [--loss fastclip-v3]

writes CHECKPOINTS/epoch_N.pt, which stock OpenCLIP loads as well, and CHECKPOINTS/epoch_N.fastclip.
"""

import argparse
import sys
from pathlib import Path

from .checkpoint.released import RELEASED_LOSSES, convert
from .errors import EXIT_USER_ERROR, UserError


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m open_clip_train_fastclip.convert",
        description="Turn a checkpoint of the released code into a pair that this package resumes from.",
    )
    parser.add_argument("released", type=Path, help="epoch_N.pt of the released code")
    parser.add_argument("checkpoints", type=Path, help="folder for epoch_N.pt and epoch_N.fastclip")
    parser.add_argument(
        "--loss",
        choices=sum(RELEASED_LOSSES.values(), ()),
        help="its algorithm, where the file does not tell (all but v2)",
    )
    args = parser.parse_args(argv)
    try:
        path, loss = convert(args.released, args.checkpoints, args.loss)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    size, name = loss.table.num_samples, loss.config.loss
    print(f"wrote {path} and its state: {int(loss.visited)} of {size} samples visited, tau {loss.temperature:.4g}")
    print(
        f"go on with: --loss {name} --resume {path} --sample-id json-key --data-size {size}, "
        "and the released run's own flags: its checkpoint holds neither gamma nor rho"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

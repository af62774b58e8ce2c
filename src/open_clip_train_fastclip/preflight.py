"""What would stop a run, found in seconds by one process before a job starts its many.

    python -m open_clip_train_fastclip.preflight --processes 32 --processes-per-node 4 -- FLAGS OF THE TRAINING COMMAND

Checks the flags, the GPUs, the data, the shards for all workers, the run's name and the space on the disk. The last
line that it prints says what it found, or what is wrong; the exit code is 0 or 2.
"""

import argparse
import logging
import sys

from .errors import EXIT_USER_ERROR, UserError, user_message


def main(argv: list[str] | None = None) -> int:
    """Check a run before it starts; returns the exit code: 0, or 2 for what must be mended."""
    parser = argparse.ArgumentParser(
        prog="python -m open_clip_train_fastclip.preflight",
        description="Check a run before it starts.",
        usage="%(prog)s [options] -- FLAGS",
    )
    parser.add_argument("--processes", type=int, default=1, help="of the whole run; default: 1")
    parser.add_argument("--processes-per-node", type=int, default=1, help="default: 1")
    ours, flags = _split(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(ours)
    from .openclip.preflight import findings  # OpenCLIP's imports take seconds

    logging.disable(logging.WARNING)  # open_clip warns that the model, of which only the size counts, has no weights
    try:
        found = findings(flags, options.processes, options.processes_per_node)
    except UserError as error:
        print(f"preflight: error: {user_message(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"preflight: {', '.join(found)}")
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    return argv[: argv.index("--")], argv[argv.index("--") + 1 :]


if __name__ == "__main__":
    sys.exit(main())

"""What the commands share: numbers in their flags, and the exit code of a mistake or an interrupt."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from open_clip_train_fastclip.errors import UserError


def positive(text: str) -> int:
    """The type of a flag that counts something."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more")
    return int(text)


def exit_code_of(work: Callable[[], int]) -> int:
    """What work() returns; 2 and one line for a UserError, 130 for an interrupt, 141 if nobody reads the output.

    SIGTERM ends it with 143, as an exit and not at once, so that the processes it started are ended too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is not run again", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain again at its end
        return 141

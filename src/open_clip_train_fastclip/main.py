"""The command line: OpenCLIP's main() with FastCLIP's patches, and an honest exit code on every rank."""

import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from .checkpoint.atomic import one_line
from .errors import UserError, user_message
from .training.signals import EXIT_STOPPED, Stopped, ignore_signals

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
GAVE_UP = -1  # what OpenCLIP's main() returns when it has printed why it does not train


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate with OpenCLIP's flags and ours; returns the exit code.

    0: done; 1: failed; 2: wrong input; 75: saved because of a signal, to be started again with --resume latest.
    """
    try:
        result = _train(sys.argv[1:] if argv is None else argv)
    except Stopped as stopped:
        if _rank() == 0:
            logging.info(stopped)
        return EXIT_STOPPED
    except UserError as error:
        rank = _rank()
        if rank == 0 or not error.on_all_ranks:
            where = "" if error.on_all_ranks else f" on rank {rank}"
            print(f"open-clip-train-fastclip: error{where}: {user_message(error)}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # torch's words for a worker that is gone
            print(
                f"open-clip-train-fastclip: error on rank {_rank()}: a process that loads data was killed "
                f"({one_line(error)}): it often means that the memory is full, so lower --workers or --batch-size and "
                "go on with --resume latest",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_FAILED
        if not _lost_a_rank(error):
            raise
        print(
            "open-clip-train-fastclip: error: another rank ended, or kept this one waiting for longer than "
            f"--dist-timeout: see what the first rank to end says ({one_line(error)})",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_FAILED
    except ValueError as error:
        if "loaded state dict" not in str(error):  # what torch says of an optimizer's state that does not fit
            raise
        print(
            "open-clip-train-fastclip: error: --resume: the checkpoint's optimizer is of other parameters: give the "
            "--opt, --lock-* and temperature flags of that run, or take its weights alone with --fastclip-fresh-state",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_USER_ERROR
    return EXIT_FAILED if result == GAVE_UP else 0


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _lost_a_rank(error: RuntimeError) -> bool:
    # gloo raises a bare RuntimeError that only its text tells
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def _train(argv: list[str]) -> int | None:
    import open_clip

    open_clip.add_model_config(Path(__file__).parent / "model_configs")
    from .openclip.hooks import Run
    from .openclip.patches import applied

    run = Run()
    try:
        with applied(run):
            import open_clip_train.main

            result = open_clip_train.main.main(argv)
        if result != GAVE_UP:  # perhaps rank 0 alone: the others are not where a barrier would find them
            run.finish()
    finally:
        run.signals.unwatch()
    return result


def console() -> None:
    """Entry point of the console script; ends the process with main()'s exit code."""
    try:
        code = main()
        if code == EXIT_STOPPED:
            ignore_signals()  # srun ends the other tasks when one has ended; all shall give this code
    finally:
        # Python would wait without end for OpenCLIP's remote sync and for data workers, which do not take a SIGTERM.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each that is killed
        for child in multiprocessing.active_children():
            child.kill()
    sys.exit(code)


if __name__ == "__main__":
    console()

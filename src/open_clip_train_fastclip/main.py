"""The command line: OpenCLIP's main() with FastCLIP's patches, and the same exit code on every rank."""

import logging
import multiprocessing
import re
import signal
import sys
import traceback

import torch.distributed as dist

from .errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, one_line, user_message
from .training.signals import EXIT_PREEMPTED, Preempted, ignore_signals

# What is said of a peer that is gone or does not come.
# gloo (pair.cc, unbound_buffer.cc): "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out
# waiting 1800000ms for recv operation", "Application timeout caused pair closure", "Connect timeout"
# torch's store (TCPStore.cpp, socket.cpp): "Connection was likely closed", "wait timeout after 300000ms", "client
# socket has timed out"
# torch of NCCL (ProcessGroupNCCL.cpp, NCCLUtils.cpp): "Watchdog caught collective operation timeout", "before timing
# out", "communicator was aborted"
# NCCL (init.cc, socket.cc): "remote process exiting prematurely", "Connection closed by remote peer"
LOST_RANK = re.compile(
    r"connection (was likely )?closed|connection (was )?reset|connection refused|broken pipe|connect timeout"
    r"|(application|operation|wait|NCCL) timeout|timed out|timing out|communicator was aborted|remote process exit",
    re.IGNORECASE,
)


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate with OpenCLIP's flags and ours; returns the exit code.

    0: done; 1: failed; 2: wrong input; 75: saved because of a signal, to be started again with --resume latest;
    130: Ctrl-C where nothing could be saved.
    """
    from .openclip.hooks import train  # OpenCLIP's imports take seconds

    try:
        return 0 if train(sys.argv[1:] if argv is None else argv) else EXIT_FAILED
    except Preempted as preempted:
        if _rank() == 0:
            logging.info(preempted)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        if _rank() == 0:
            _say("interrupted: nothing was saved since the last checkpoint")
        return EXIT_INTERRUPTED
    except UserError as error:
        if _rank() == 0 or not error.on_all_ranks:
            where = "" if error.on_all_ranks else f" on rank {_rank()}"
            _say(f"error{where}: {user_message(error)}")
        return EXIT_USER_ERROR
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        code, text = _explained(error)
        if code is None:
            raise
        _say(text)
        return code


def _explained(error: Exception) -> tuple[int | None, str]:
    """The exit code and the line for an error of torch that is no bug, told by its text; None for others."""
    text = str(error)
    is_runtime_error = isinstance(error, RuntimeError)
    if is_runtime_error and "DataLoader worker" in text or _is_of_killed_worker(error):
        return EXIT_FAILED, (
            f"error on rank {_rank()}: a process that loads data was killed ({one_line(error)}): it often means that "
            "the memory is full, so lower --workers or --batch-size and go on with --resume latest"
        )
    if is_runtime_error and _is_of_lost_rank(error):
        # NCCL's own words stand below torch's account of where it was told
        _, _, last = text.partition("Last error:")
        why = last.strip().splitlines()[0] if last.strip() else one_line(error)
        return EXIT_FAILED, (
            "error: another rank ended, or kept this one waiting for longer than --dist-timeout: see what the first "
            f"rank to end says ({why})"
        )
    if isinstance(error, ValueError) and "loaded state dict" in text:
        return EXIT_USER_ERROR, (
            "error: --resume: the checkpoint's optimizer is of other parameters: give the --opt, --lock-* and "
            "temperature flags of that run, or take its weights alone with --fastclip-fresh-state"
        )
    return None, ""


def _is_of_killed_worker(error: Exception) -> bool:
    """Whether a data worker was gone when its batch was fetched: here, or where batches are pinned (see the text)."""
    where = "".join(traceback.format_tb(error.__traceback__)) + str(error)
    return isinstance(error, OSError | EOFError) and "rebuild_storage_fd" in where


def _is_of_lost_rank(error: Exception) -> bool:
    """Whether a backend says that a peer went away or did not come, and not that it was used wrongly."""
    # gloo raises a bare RuntimeError, whose text begins with the place in its source
    of_backend = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    return of_backend and LOST_RANK.search(str(error)) is not None


def _say(text: str) -> None:
    print(f"open-clip-train-fastclip: {text}", file=sys.stderr, flush=True)


def _rank() -> int:
    from .openclip.environment import rank_of_process

    return dist.get_rank() if dist.is_initialized() else rank_of_process()


def console() -> None:
    """Entry point of the console script; ends the process with main()'s exit code."""
    try:
        code = main()
        if code == EXIT_PREEMPTED:
            ignore_signals()  # srun ends the other tasks when one has ended; all shall give this code
    finally:
        # Python would wait without end for OpenCLIP's remote sync and for data workers, which do not take a SIGTERM.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each that is killed
        for child in multiprocessing.active_children():
            child.kill()
    sys.exit(code)


if __name__ == "__main__":
    console()

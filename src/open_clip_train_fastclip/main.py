"""The command line: OpenCLIP's main() with FastCLIP's patches, and an honest exit code on every rank."""

import multiprocessing
import os
import sys
from pathlib import Path

import torch.distributed as dist

from .durable import one_line
from .errors import UserError, user_message

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
GAVE_UP = -1  # what OpenCLIP's main() returns when it has printed why it does not train


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate with OpenCLIP's flags and ours; returns the exit code: 0, 1 (failed) or 2 (wrong input)."""
    try:
        result = _train(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        if rank == 0 or not error.on_all_ranks:
            where = "" if error.on_all_ranks else f" on rank {rank}"
            print(f"open-clip-train-fastclip: error{where}: {user_message(error)}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except RuntimeError as error:
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


def _lost_a_rank(error: RuntimeError) -> bool:
    # gloo raises a bare RuntimeError that only its text tells
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def _train(argv: list[str]) -> int | None:
    import open_clip

    open_clip.add_model_config(Path(__file__).parent / "model_configs")
    from .patches import applied
    from .run import Run

    run = Run()
    with applied(run):
        import open_clip_train.main

        result = open_clip_train.main.main(argv)
    if result == GAVE_UP:
        return result  # perhaps rank 0 alone: the others are not where a barrier would find them
    run.finish()
    return result


def console() -> None:
    """Entry point of the console script; ends the process with main()'s exit code."""
    try:
        code = main()
    finally:
        # OpenCLIP's remote sync is a process of its own, for which Python would wait without end
        for child in multiprocessing.active_children():
            child.terminate()
    sys.exit(code)


if __name__ == "__main__":
    console()

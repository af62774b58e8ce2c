"""--profile: ten steps of training as a Chrome trace a rank in the run's folder, for benchmarks/step_time.py."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ..checkpoint.atomic import one_line
from ..openclip.checks import logs_are_written

IDLE, WARM_UP, TRACED = 10, 2, 10  # steps without the profiler, steps that it runs and forgets, steps that it keeps
STEPS = IDLE + WARM_UP + TRACED
FOLDER = "profile"  # of a run's folder
LOSS = "loss"  # name of the loss's calls in a trace


def marked(loss: Callable) -> Callable:
    """`loss`, its calls named LOSS in a trace: OpenCLIP's own losses show as nothing but their matrix products."""

    def call(*args, **kwargs):
        with record_function(LOSS):
            return loss(*args, **kwargs)

    return call


def profiled(batches: Iterable, args, num_steps: int, settle: Callable[[], None]) -> Iterator:
    """Yield `batches` and write FOLDER/rank-NNNNN.json.gz once its steps are traced.

    A step is args.accum_freq batches, from asking for the first to asking for the one after the last; num_steps: how
    many there are; settle: waits for the collectives still under way, since one that a gloo thread ends after the
    profiler has stopped writes into memory that is freed. Too few steps, or a run without a folder, get a warning
    instead of a trace.
    """
    batches = iter(batches)
    if num_steps >= STEPS and logs_are_written(args):
        activities = [ProfilerActivity.CPU]
        if str(args.device).startswith("cuda"):
            activities.append(ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the missing GPU would be logged as an error
        plan = schedule(wait=IDLE, warmup=WARM_UP, active=TRACED, repeat=1)
        with profile(activities=activities, schedule=plan, on_trace_ready=lambda p: _write(p, args)) as profiler:
            for step in range(1, STEPS + 1):
                yield from islice(batches, args.accum_freq)
                if step == STEPS:
                    settle()
                profiler.step()
    elif args.rank == 0:
        why = f"traces steps {STEPS - TRACED + 1} to {STEPS} of an epoch, and those of {args.name} have {num_steps}"
        if num_steps >= STEPS:
            why = "writes into the run's folder, and --logs none keeps none"
        logging.warning(f"--profile {why}: no trace is written")
    yield from batches


def _write(profiler: profile, args) -> None:
    """Write the trace, unless the run ends in its midst; a disk that does not take it gets a warning."""
    if profiler.step_num < STEPS:
        return
    path = Path(args.logs, args.name, FOLDER, f"rank-{args.rank:05d}.json.gz")
    partial = path.with_name(f".{path.name}")  # hidden, since the profiler goes by the ending
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(partial))
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        logging.warning(f"--profile: {path} cannot be written ({one_line(error)})")
        return
    if args.rank == 0:
        logging.info(f"--profile: {TRACED} steps are traced in {path.parent}, a file a rank")

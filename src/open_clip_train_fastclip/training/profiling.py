"""--profile: TRACED steps of training as a Chrome trace a rank in the run's folder, for benchmarks/step_time.py."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ..errors import one_line

IDLE, WARM_UP, TRACED = 10, 2, 10  # steps without the profiler, steps that it runs and forgets, steps that it keeps
STEPS = IDLE + WARM_UP + TRACED
FOLDER = "profile"  # of a run's folder
LOSS = "loss"  # name of the loss's calls in a trace


def marked(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss`, its calls named LOSS in a trace: OpenCLIP's own losses show as nothing but their matrix products."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(LOSS):
            return loss(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Trace:
    """Where a rank's trace goes, and what it needs to know of the loop."""

    run: str  # its name
    folder: Path | None  # of the run; None if it keeps none
    rank: int
    accum_freq: int
    device: torch.device  # that the model is on


def profiled(batches: Iterable[Any], trace: Trace, num_steps: int, settle: Callable[[], None]) -> Iterator[Any]:
    """Yield `batches` and write FOLDER/rank-NNNNN.json.gz once its steps are traced.

    A step is accum_freq batches, from asking for the first to asking for the one after the last; num_steps: how many
    there are; settle: waits for the collectives still under way, since one that a gloo thread ends after the profiler
    has stopped writes into memory that is freed. A GPU has done its work when the traced steps begin and when they end,
    so that the trace holds theirs and no other. Too few steps, or a run without a folder, get a warning instead of a
    trace.
    """
    batches, on_gpu = iter(batches), trace.device.type == "cuda"
    if num_steps >= STEPS and trace.folder is not None:
        activities = [ProfilerActivity.CPU]
        if on_gpu:
            activities.append(ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the missing GPU would be logged as an error
        plan = schedule(wait=IDLE, warmup=WARM_UP, active=TRACED, repeat=1)
        with profile(activities=activities, schedule=plan, on_trace_ready=lambda p: _write(p, trace)) as profiler:
            for step in range(1, STEPS + 1):
                yield from islice(batches, trace.accum_freq)
                if step in (STEPS - TRACED, STEPS):
                    settle()
                    if on_gpu:
                        torch.cuda.synchronize(trace.device)
                profiler.step()
    elif trace.rank == 0:
        why = f"traces steps {STEPS - TRACED + 1} to {STEPS} of an epoch, and those of {trace.run} have {num_steps}"
        if num_steps >= STEPS:
            why = "writes into the run's folder, and --logs none keeps none"
        logging.warning(f"--profile {why}: no trace is written")
    yield from batches


def _write(profiler: profile, trace: Trace) -> None:
    """Write the trace, unless the run ends before it is complete; a disk that does not take it gets a warning."""
    if profiler.step_num < STEPS:
        return
    assert trace.folder is not None  # without one nothing is traced
    path = trace.folder / FOLDER / f"rank-{trace.rank:05d}.json.gz"
    partial = path.with_name(f".{path.name}")  # hidden, since the profiler goes by the ending
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(partial))
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        logging.warning(f"--profile: {path} cannot be written ({one_line(error)})")
        return
    if trace.rank == 0:
        logging.info(f"--profile: {TRACED} steps are traced in {path.parent}, a file a rank")

"""How long training pauses for a save inside an epoch and for a resume, with a large per-sample table on two ranks.

    python -m benchmarks.checkpoint_cost [--samples 1000000 100000000 414080000] [--saves 3]

The ordinary command line trains on glyph pairs with --save-every, synchronous and with --save-async, until `--saves`
checkpoints are complete; SIGUSR1 then ends it, and a second run resumes it. Measured are the time between two steps, in
which nothing but the save happens, the time of a step, and the time until the first step is done. The last line is
JSON, and each row is appended to benchmarks/results/checkpoint_cost.jsonl.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import open_clip_train.main

from open_clip_train_fastclip.main import main as train
from open_clip_train_fastclip.openclip import register_models
from open_clip_train_fastclip.training.checkpointer import AsyncCheckpointer
from open_clip_train_fastclip.training.signals import EXIT_PREEMPTED

from .glyph_data import dataset
from .harness.command import positive
from .harness.processes import existing_group, in_processes
from .harness.records import RESULTS, finish, quartiles

RANKS, BATCH, STEPS_BETWEEN = 2, 64, 10
SAMPLES = (1_000_000, 100_000_000, 414_080_000)  # the last is LAION400M
MODES = {"synchronous": [], "background": ["--save-async"]}
FLAGS = (
    f"--loss fastclip-v3 --model ViT-Glyph-32 --device cpu --precision fp32 --workers 0 --batch-size {BATCH} "
    f"--epochs 2 --lr 1e-4 --warmup 10 --seed 0 --dataset-resampled --train-num-samples {BATCH * RANKS * 10_000} "
    f"--sample-id json-key --save-every {STEPS_BETWEEN}steps --keep 1 --log-every-n-steps 1000000 --resume latest"
)


@dataclass
class Times:
    """What one rank saw of a run, in seconds."""

    first_step: float | None = None  # after the start of the command
    steps: list[float] = field(default_factory=list)  # with no save under way
    slowed_steps: list[float] = field(default_factory=list)  # while one is written
    pauses: list[float] = field(default_factory=list)  # of each save: copy, wait and completion
    copies: list[float] = field(default_factory=list)  # of table, model and optimizer, to the CPU
    saves: list[float] = field(default_factory=list)  # until the checkpoint was complete


def observed_run(argv: list[str], saves: int) -> Times:
    """On every rank: run the command until so many saves are complete (0: until the first step) and end it."""
    register_models()
    times, clock, start = Times(), time.perf_counter, time.perf_counter()
    last = started = None
    real_boundary, real_begin = AsyncCheckpointer.at_boundary, AsyncCheckpointer._begin
    real_finish = AsyncCheckpointer._finish

    def begin(self, progress):
        nonlocal started
        started = clock()
        save = real_begin(self, progress)
        if len(times.saves) < saves:  # the save that ends the run is another kind
            times.copies.append(clock() - started)
            times.pauses.append(times.copies[-1])
        return save

    def finish_save(self, save):
        arrived = clock()
        folder = real_finish(self, save)
        if len(times.saves) < saves:
            times.pauses[-1] += clock() - arrived
            times.saves.append(clock() - started)
        return folder

    def at_boundary(self, progress, **how):
        nonlocal last
        arrived = clock()
        if times.first_step is None:
            times.first_step = arrived - start
        else:
            (times.steps if self._running is None else times.slowed_steps).append(arrived - last)
        real_boundary(self, progress, **how)
        last = clock()
        if len(times.saves) >= saves:
            os.kill(os.getpid(), signal.SIGUSR1)

    with (
        existing_group(),
        patch.object(
            open_clip_train.main, "setup_logging", lambda log_file, level: logging.getLogger().setLevel(logging.ERROR)
        ),
        patch.object(AsyncCheckpointer, "at_boundary", at_boundary),
        patch.object(AsyncCheckpointer, "_begin", begin),
        patch.object(AsyncCheckpointer, "_finish", finish_save),
    ):
        if (code := train(argv)) != EXIT_PREEMPTED:
            raise RuntimeError(f"the training ended with exit code {code}")
    return times


def row_of(num_samples: int, mode: str, folder: str, data: Path, shards: int, saves: int) -> dict:
    """Medians of the slower rank; printed."""
    argv = [
        *FLAGS.split(), *MODES[mode], "--data-size", str(num_samples), "--logs", folder, "--name", mode,
        "--train-data", f"{data}/train/{{00000..{shards - 1:05d}}}.tar",
    ]  # fmt: skip
    fresh = in_processes(RANKS, observed_run, argv, saves)
    resumed = in_processes(RANKS, observed_run, argv, 0)

    def slowest(name):
        return max(quartiles(getattr(times, name))[1] for times in fresh)

    step, pause, copy = slowest("steps"), slowest("pauses"), slowest("copies")
    row = {
        "samples": num_samples,
        "ranks": RANKS,
        "mode": mode,
        "saves": saves,
        "step_ms": round(1000 * step, 1),
        "pause_ms": round(1000 * pause, 1),
        "copy_ms": round(1000 * copy, 1),
        "pause_beyond_copy_in_steps": round((pause - copy) / step, 2),
        "step_while_writing_ms": round(1000 * slowest("slowed_steps"), 1) if fresh[0].slowed_steps else None,
        "seconds_until_complete": round(slowest("saves"), 2),
        "first_step_fresh_s": round(max(times.first_step for times in fresh), 2),
        "first_step_resumed_s": round(max(times.first_step for times in resumed), 2),
    }
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_cost", description="Pause of training for a save and for a resume."
    )
    parser.add_argument(
        "--samples", nargs="+", type=int, default=SAMPLES, metavar="N", help="rows of the table (default: %(default)s)"
    )
    parser.add_argument("--saves", type=positive, default=3, help="of each run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of checkpoint_cost.jsonl")
    args = parser.parse_args(argv)
    settings = dataset.Settings(characters=20, train_per_character=20, val_per_character=1, val_shards=1)
    pairs = settings.characters * settings.train_per_character
    if min(args.samples) <= pairs:
        parser.error(f"--samples {min(args.samples)}: the table must be larger than the {pairs} pairs of the data")
    rows = []
    with tempfile.TemporaryDirectory(prefix="checkpoint-cost-") as name:
        data = Path(name, "data")
        dataset.make(data, settings)
        for num_samples in args.samples:
            for mode in MODES:
                with tempfile.TemporaryDirectory(prefix="checkpoint-cost-") as folder:
                    rows.append(row_of(num_samples, mode, folder, data, settings.train_shards, args.saves))
    finish("checkpoint_cost", argv, rows, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

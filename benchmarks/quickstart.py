"""What `make quickstart` runs: OpenCLIP and FastCLIP trained side by side on glyph data, and a table of both.

    python -m benchmarks.quickstart [--mismatched 0.3] [--losses clip clip-frozen fastclip-v1 fastclip-v3] [--jobs 2]

Every run is the ordinary command line with the same model, data, seed, steps and batch; only the flags of LOSSES
differ. A finished run is used again as long as its command and its data are the same.
"""

import argparse
import math
import os
import signal
import sys
from pathlib import Path

from open_clip_train_fastclip.loss.config import LOSSES as FASTCLIP_LOSSES

from .experiments.training_runs import Run, train_all
from .glyph_data import dataset
from .harness.command import exit_code_of
from .quickstart_table import write_table

LOSSES = {
    "clip": "--loss clip",
    "clip-frozen": "--loss clip --freeze-temperature --temperature 0.07",
} | {loss: f"--loss {loss}" for loss in FASTCLIP_LOSSES}  # with the defaults of their flags
DEFAULT_LOSSES = ("clip", "clip-frozen", "fastclip-v1", "fastclip-v3")
MODEL, BATCH, EPOCHS = "ViT-Glyph-32", 32, 12
WARMUP_SHARE = 0.05  # of all steps
OPTIMIZER = "--lr 5e-4 --wd 0.1 --beta1 0.9 --beta2 0.98 --eps 1e-6"
# Loading in the training process is faster than a worker when every core trains.
MACHINE = "--workers 0 --precision fp32 --device cpu --seed 0 --save-frequency 0 --log-every-n-steps 20"


def plan(losses: list[str], data: Path, logs: Path, info: dict, epochs: int) -> list[Run]:
    """The runs of a table: the same command line for every loss but for the flags of LOSSES."""
    steps = math.ceil(info["train_pairs"] / BATCH) * epochs
    shards = {split: info["settings"][f"{split}_shards"] - 1 for split in ("train", "val")}
    common = [
        *("--train-data", f"{data}/train/{{00000..{shards['train']:05d}}}.tar"),
        *("--val-data", f"{data}/val/{{00000..{shards['val']:05d}}}.tar", "--val-num-samples", str(info["val_pairs"])),
        *("--model", MODEL, "--batch-size", str(BATCH), "--epochs", str(epochs)),
        *(*OPTIMIZER.split(), "--warmup", str(round(WARMUP_SHARE * steps)), *MACHINE.split(), "--logs", str(logs)),
    ]
    return [
        Run(loss, logs, [*LOSSES[loss].split(), *common, "--name", loss], info["sha256"], BATCH, steps, epochs)
        for loss in losses
    ]


def compare(args, data: Path, logs: Path) -> int:
    """Makes the data, trains what is not trained yet and prints the table; 1 if a run failed."""
    info = dataset.make(data, dataset.Settings(mismatched=args.mismatched))
    print(f"data: {data}, see {data}/contact_sheet.png; runs: {logs}", flush=True)
    runs = plan(list(dict.fromkeys(args.losses)), data, logs, info, EPOCHS)
    train_all(runs, max(1, min(args.jobs, len(runs))))
    print("\n" + write_table(runs, info, logs))
    return 1 if any(run.error for run in runs) else 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 (a run failed) or 2 (wrong input)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    default_share = dataset.Settings.mismatched
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart", description="Train OpenCLIP and FastCLIP side by side on glyph data."
    )
    parser.add_argument(
        "--mismatched", type=float, default=default_share, metavar="SHARE",
        help="share of the training captions exchanged at random among themselves, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(DEFAULT_LOSSES), metavar="LOSS",
        help=f"the rows of the table, from: {', '.join(LOSSES)} (default: {' '.join(DEFAULT_LOSSES)})",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=cores, metavar="N",
        help="runs at a time, one thread each (default: one a core, here %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that train_all ends its processes
    # The default share has the plain names; others lie beside it, so that no table replaces another's.
    suffix = "" if args.mismatched == default_share else f"-mismatched-{args.mismatched:g}"
    data, logs = Path("data", f"glyphs{suffix}"), Path("runs", f"quickstart{suffix}")
    return exit_code_of(lambda: compare(args, data, logs))


if __name__ == "__main__":
    sys.exit(main())

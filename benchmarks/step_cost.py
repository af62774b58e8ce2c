"""Whole training steps of OpenCLIP and of each FastCLIP loss, and what a large per-sample table costs.

    python -m benchmarks.step_cost [ViT-Glyph-32:2048 ...] [--ranks 1 2] [--table-samples 414080000]

Every loss is set up by the ordinary command line up to its first epoch; then blocks of a few steps of all losses are
run in turn in one process a rank, each by OpenCLIP's train_one_epoch with the patches that the loss has. The data are
OpenCLIP's synthetic ones with images and captions that differ and are ready, so that no decoding hides the steps; a
data worker makes the batches, as in any real run. The last line is JSON, and each row is appended to
benchmarks/results/step_cost.jsonl.
"""

import argparse
import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import open_clip
import open_clip_train.data
import open_clip_train.main
import open_clip_train.train
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from open_clip_train_fastclip.loss.config import LOSSES
from open_clip_train_fastclip.openclip import register_models
from open_clip_train_fastclip.openclip.hooks import Run
from open_clip_train_fastclip.openclip.patches import applied

from .harness.command import positive
from .harness.processes import existing_group, in_processes
from .harness.records import RESULTS, finish, quartiles, ratio_quartiles
from .harness.table_cost import table_rows

CASES = ("ViT-Glyph-32:64", "ViT-Glyph-32:512", "ViT-S-32:32")
CLIP_FLAGS = {1: "--loss clip", 2: "--loss clip --local-loss --gather-with-grad"}
FLAGS = (
    "--dataset-type synthetic --device cpu --precision fp32 --workers 1 --lr 1e-4 --warmup 10 --seed 0 "
    "--save-frequency 0 --log-every-n-steps 1000000"
)


class ReadySamples(Dataset):
    """Stands in for OpenCLIP's SyntheticDataset: random images and captions, transformed and tokenised beforehand."""

    def __init__(self, transform=None, image_size=(224, 224), caption="", dataset_size=100, tokenizer=None):
        generator = torch.Generator().manual_seed(0)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.images = torch.randn(dataset_size, 3, height, width, generator=generator)
        self.texts = tokenizer([f"picture number {i}" for i in range(dataset_size)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.texts[index]


class _SetUp(Exception):
    """Leaves main() when it is about to train."""


def set_up(argv: list[str]) -> tuple[Callable[[int], None], torch.optim.Optimizer]:
    """Run the command line up to its first epoch; returns what trains an epoch of a given number, and the optimizer."""
    stock, captured = open_clip_train.train.train_one_epoch, {}

    @functools.wraps(stock)
    def train_one_epoch(*args, **kwargs):
        if captured:
            return stock(*args, **kwargs)
        captured.update(args=args, kwargs=kwargs, called=open_clip_train.main.train_one_epoch)
        raise _SetUp

    replaced = [
        (open_clip_train.main, "train_one_epoch", train_one_epoch),
        (open_clip_train.main, "setup_logging", lambda log_file, level: logging.getLogger().setLevel(logging.ERROR)),
        (open_clip_train.data, "SyntheticDataset", ReadySamples),
    ]
    with ExitStack() as stack:
        for module, name, replacement in replaced:
            stack.enter_context(patch.object(module, name, replacement))
        stack.enter_context(existing_group())
        stack.enter_context(applied(Run()))
        try:
            open_clip_train.main.main(argv)
        except _SetUp:
            pass
    model, data, loss, _, *rest = captured["args"]

    def train_epoch(epoch: int) -> None:
        captured["called"](model, data, loss, epoch, *rest, **captured["kwargs"])

    return train_epoch, rest[0]


def block_seconds(model: str, batch: int, losses: list[str], steps: int, rounds: int) -> dict[str, list[float]]:
    """On every rank: seconds of each loss's blocks of `steps` steps, one a round, after a first one to warm up."""
    register_models()
    ranks = int(os.environ["WORLD_SIZE"])
    samples = steps * batch * ranks
    common = f"{FLAGS} --model {model} --batch-size {batch} --train-num-samples {samples} --epochs {rounds + 2}".split()
    with tempfile.TemporaryDirectory(prefix="step-cost-") as folder:
        trainers = {}
        for name in losses:
            flags = CLIP_FLAGS[min(ranks, 2)] if name == "clip" else f"--loss {name}"
            trainers[name] = set_up([*flags.split(), *common, "--logs", folder, "--name", name])
        times, order = {name: [] for name in losses}, list(losses)
        for epoch in range(rounds + 1):
            for name in order:
                train_epoch, optimizer = trainers[name]
                if ranks > 1:
                    dist.barrier()
                start = time.perf_counter()
                train_epoch(epoch)
                if ranks > 1:
                    dist.barrier()
                if epoch:
                    times[name].append(time.perf_counter() - start)
                optimizer.zero_grad()  # or all losses' gradients are in memory at once
            order.reverse()
    return times


def step_rows(case: str, losses: list[str], ranks: int, args) -> list[dict]:
    """A row a loss: samples/s, and the quartiles of its ratio to OpenCLIP's in the same round."""
    model, batch = case.rsplit(":", 1)
    names = ["clip", *losses]
    times = in_processes(ranks, block_seconds, model, int(batch), names, args.steps, args.rounds)[0]
    rows = []
    for name, seconds in times.items():
        q1, ratio, q3 = ratio_quartiles(times["clip"], seconds)
        rows.append(
            {
                "kind": "step",
                "case": case,
                "ranks": ranks,
                "loss": name,
                "steps": args.steps,
                "rounds": args.rounds,
                "samples_per_second": round(args.steps * int(batch) * ranks / quartiles(seconds)[1], 2),
                "samples_ratio_to_clip": round(ratio, 4),
                "ratio_quartiles": [round(q1, 4), round(q3, 4)],
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """The rows of one case and number of ranks as a table."""
    first = rows[0]
    print(f"\n{first['case']}, {first['ranks']} rank(s), {first['rounds']} rounds of {first['steps']} steps a loss")
    print(f"{'loss':13} {'samples/s':>10} {'ratio to OpenCLIP':>18}  quartiles")
    for row in rows:
        q1, q3 = row["ratio_quartiles"]
        ratio = f"{row['samples_ratio_to_clip']:18.3f}  {q1:.3f} to {q3:.3f}"
        print(f"{row['loss']:13} {row['samples_per_second']:10.1f} {ratio}", flush=True)


def case_of(text: str) -> str:
    """The type of MODEL:BATCH."""
    register_models()
    model, _, batch = text.rpartition(":")
    if model not in open_clip.list_models():
        raise argparse.ArgumentTypeError(f"{text} is no MODEL:BATCH with a model of open_clip.list_models()")
    positive(batch)
    return text


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description="Cost of whole training steps.")
    parser.add_argument(
        "cases", nargs="*", type=case_of, default=CASES, metavar="MODEL:BATCH",
        help=f"pairs a rank (default: {' '.join(CASES)})",
    )  # fmt: skip
    parser.add_argument("--ranks", nargs="+", type=positive, default=[1, 2], help="default: %(default)s")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help="default: all of FastCLIP's"
    )
    parser.add_argument("--rounds", type=positive, default=10, help="blocks of each loss (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="of a block, an epoch (default: %(default)s)")
    parser.add_argument(
        "--table-samples", type=int, default=414_080_000, metavar="N",
        help="rows of the table whose cost is measured on 2 ranks; 0: leave it out (default: LAION400M's %(default)s)",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step_cost.jsonl")
    args = parser.parse_args(argv)
    rows = []
    for case in args.cases:
        for ranks in args.ranks:
            rows += step_rows(case, args.losses, ranks, args)
            show(rows[-1 - len(args.losses) :])
    if args.table_samples:
        rows += table_rows(args.table_samples)
    finish("step_cost", argv, rows, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

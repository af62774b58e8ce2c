"""The numbers that flags take: from where to where each makes sense, OpenCLIP's own flags included."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError

MOST = 2**31 - 1  # what fits a C int: torch and the data workers count in them
LARGEST_SEED = 2**32 - 2**16  # numpy takes 32 bits, and OpenCLIP adds the rank
LONGEST_TIMEOUT = 10**9  # in seconds; torch counts in nanoseconds, in 64 bits
MOST_SAMPLES = 10**12  # a thousand times the largest sets; a table of ids beyond that fits no memory
MOST_WORKERS = 2**12


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; above, below: without low, without high."""

    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False

    def complaint(self, value: float) -> str:
        """What is wrong with a value, in words; empty if nothing is."""
        if not (value > self.low if self.above else value >= self.low):  # nan is on no side
            return f"it must be above {self.low}" if self.above else f"it must be {self.low} or more"
        if not (value < self.high if self.below else value <= self.high):
            return f"it must be below {self.high}" if self.below else f"it must be {self.high} or less"
        return ""


COUNT, FROM_ZERO = Range(1, MOST), Range(0, MOST)
SAMPLES = Range(1, MOST_SAMPLES)
FACTOR = Range(0, 1e30)  # finite, and so are its products in float32
RANGES = {
    "--train-num-samples": SAMPLES,
    "--val-num-samples": Range(0, MOST_SAMPLES),
    "--data-size": SAMPLES,
    "--samples-per-shard": COUNT,
    "--max-unusable": Range(0, 1),
    "--workers": Range(0, MOST_WORKERS),
    "--batch-size": COUNT,
    "--accum-freq": COUNT,
    "--epochs": FROM_ZERO,
    "--stop-epochs": COUNT,
    "--epochs-cooldown": FROM_ZERO,
    "--lr": FACTOR,
    "--beta1": Range(0, 1, below=True),
    "--beta2": Range(0, 1, below=True),
    "--eps": Range(0, 1),
    "--wd": FACTOR,
    "--momentum": Range(0, 1, below=True),
    "--warmup": Range(0, MOST_SAMPLES),
    "--lr-cooldown-end": FACTOR,
    "--lr-cooldown-power": FACTOR,
    "--save-frequency": FROM_ZERO,
    "--zeroshot-frequency": FROM_ZERO,
    "--val-frequency": FROM_ZERO,
    "--keep": COUNT,
    "--log-every-n-steps": COUNT,
    "--seed": Range(0, LARGEST_SEED),
    "--grad-clip-norm": Range(0, above=True),  # inf: none
    "--lock-image-unlocked-groups": FROM_ZERO,
    "--lock-text-unlocked-layers": FROM_ZERO,
    "--image-mean": Range(-1e30, 1e30),
    "--image-std": Range(0, 1e30, above=True),
    "--force-context-length": COUNT,
    "--force-image-size": COUNT,
    "--force-patch-dropout": Range(0, 1, below=True),
    "--coca-caption-loss-weight": FACTOR,
    "--coca-contrastive-loss-weight": FACTOR,
    "--remote-sync-frequency": COUNT,
    "--dist-timeout": Range(0, LONGEST_TIMEOUT, above=True),
}


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError for the first number that makes no sense; those of the algorithms are FastCLIPConfig's to check.

    --stop-epochs and --data-size are None where they were given as -1.
    """
    for flag, numbers in RANGES.items():
        given = getattr(args, flag[2:].replace("-", "_"))
        for value in given if isinstance(given, Sequence) else [given]:
            complaint = "" if value is None else numbers.complaint(value)
            if complaint:
                raise UserError(f"{flag} is {value}: {complaint}")
    for flag, values, sizes in (
        ("--image-mean", args.image_mean, (1, 3)),
        ("--image-std", args.image_std, (1, 3)),
        ("--force-image-size", args.force_image_size, (1, 2)),
    ):
        if values is not None and len(values) not in sizes:
            raise UserError(f"{flag} has {len(values)} values: give {sizes[0]} or {sizes[1]}")

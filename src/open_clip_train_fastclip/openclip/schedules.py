"""OpenCLIP's learning rates over the horizon of --epochs, though --stop-epochs ends the run earlier."""

import argparse
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from ..loss.schedules import cosine_lr_at


def cosine_lr(
    args: argparse.Namespace, optimizer: Optimizer, base_lr: float, warmup_length: int, steps: int
) -> Callable[[int], float]:
    """What sets the rate at a step: a cosine from base_lr, after a linear warm-up, to --lr-min.

    steps: of the epochs that main() trains.
    """
    full_steps = _full_steps(args, steps)

    def adjust(step: int) -> float:
        lr = cosine_lr_at(step, base_lr, warmup_length, full_steps, args.lr_min)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    return adjust


def const_lr(
    args: argparse.Namespace, stock: Callable[..., Any], optimizer: Optimizer, base_lr: float, warmup_length: int,
    steps: int, *cooldown: Any,
) -> Any:  # fmt: skip
    """OpenCLIP's own constant rate; cooldown: what its form with a cool-down takes beyond the others."""
    return stock(optimizer, base_lr, warmup_length, _full_steps(args, steps), *cooldown)


def _full_steps(args: argparse.Namespace, steps: int) -> int:
    full_steps: int = steps // max(args.epochs, 1) * args.full_epochs
    return full_steps

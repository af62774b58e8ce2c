"""Schedules of gamma and of the learning rates: stateless functions of the epoch or the step."""

import math


def gamma_at(epoch: int, schedule: str, gamma_min: float, decay_epochs: int) -> float:
    """Weight of the new estimate of u in `epoch` (0-based). Epoch 0 has 1: nothing is remembered yet.

    "cosine" falls to gamma_min over `decay_epochs` epochs; "constant" is gamma_min from epoch 1 on.
    """
    if epoch == 0:
        return 1.0
    if schedule == "constant" or epoch >= decay_epochs:
        return gamma_min
    return 0.5 * (1 + math.cos(math.pi * epoch / decay_epochs)) * (1 - gamma_min) + gamma_min


def cosine_lr_at(step: int, base_lr: float, warmup_steps: int, total_steps: int | None, lr_min: float) -> float:
    """Learning rate at `step` (0-based): linear warm-up, then a cosine from base_lr to lr_min at `total_steps`.

    Without total_steps the rate stays at base_lr after the warm-up.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    if total_steps is None or total_steps <= warmup_steps:
        return base_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return lr_min + 0.5 * (1 + math.cos(math.pi * progress)) * (base_lr - lr_min)

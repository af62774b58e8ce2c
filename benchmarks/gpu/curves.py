"""Curves of the loss to compare with those of earlier runs and of other machines."""

import tempfile
from collections.abc import Iterator

import torch

from ..harness.training_steps import RecordedLoss
from . import linear_towers
from .command_line import trainer
from .measurement import Settings, row

LINEAR_STEPS = 100
LOSSES = ("clip", "fastclip-v1", "fastclip-v3")


def rows(settings: Settings) -> Iterator[dict]:
    """A row a loss and problem; right is a curve that is finite and has fallen."""
    for loss in LOSSES:
        torch.compiler.reset()
        made = linear_towers.make_loss(loss, LINEAR_STEPS, torch.float32, settings.device)
        curve = linear_towers.train(made, LINEAR_STEPS, torch.float32, settings.device).values.tolist()
        yield of_curve({"problem": "linear towers", "loss": loss, "steps": LINEAR_STEPS}, curve)
    model, batch, steps = ("ViT-Glyph-32", 8, 10) if settings.small else ("ViT-B-32", 64, 30)
    for loss in LOSSES:
        torch.compiler.reset()
        with tempfile.TemporaryDirectory(prefix="gpu-curves-") as folder:
            made = trainer(settings, folder, model, batch, steps, 1, loss)
            made.loss = recorded = RecordedLoss(made.loss)
            made.train(0)
        case = {"problem": f"{model}:{batch} {settings.precision}", "loss": loss, "steps": steps}
        yield of_curve(case, torch.stack(recorded.values).tolist())


def of_curve(case: dict, values: list[float]) -> dict:
    """The row of a curve."""
    curve = [round(value, 6) for value in values]
    part = max(1, len(curve) // 10)
    has_fallen = sum(curve[-part:]) < sum(curve[:part])  # False for a NaN
    return row("curve", case, {"curve": curve}, has_fallen)

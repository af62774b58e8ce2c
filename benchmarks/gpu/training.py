"""Whole training steps of clip and fastclip-v3 in turn, set up by the ordinary command line.

The batches are on the device already, so neither decoding nor copying is in a step; what a data path costs is the same
for all losses. A step that takes longer than its kernels waits for the host, which gives them one by one.
"""

import statistics
import tempfile
from collections.abc import Iterator

import torch

from ..harness.records import ratio_quartiles
from ..harness.timing import gpu_work
from ..harness.training_steps import Trainer, alternate_epochs
from .command_line import trainer
from .measurement import Settings, row

LOSSES = ("clip", "fastclip-v3")
STEPS, ROUNDS = 10, 5


def rows(settings: Settings, model: str, batch: int) -> Iterator[dict]:
    """A row a loss for the time of a step; on a GPU one more for what the GPU does in it."""
    if settings.small:
        model, batch = "ViT-Glyph-32", 8
    steps, rounds = (3, 2) if settings.small else (STEPS, ROUNDS)
    cases = {loss: {"model": model, "batch": batch, "batches": "kept on the device", "loss": loss} for loss in LOSSES}
    with tempfile.TemporaryDirectory(prefix="gpu-training-") as folder:
        trainers = {loss: trainer(settings, folder, model, batch, steps, rounds + 3, loss) for loss in LOSSES}
        seconds = alternate_epochs(trainers, rounds, settings.device)
        step_ms = {loss: 1e3 * statistics.median(seconds[loss]) / steps for loss in LOSSES}
        for loss in LOSSES:
            q1, ratio, q3 = ratio_quartiles(seconds["clip"], seconds[loss])
            figures = {
                "step_ms": round(step_ms[loss], 3),
                "step_ms_of_rounds": [round(1e3 * s / steps, 3) for s in seconds[loss]],
                "samples_per_second": round(1e3 * batch / step_ms[loss], 1),
                "samples_ratio_to_clip": round(ratio, 4),
                "ratio_quartiles": [round(q1, 4), round(q3, 4)],
            }
            yield row("training step", cases[loss], figures)
        for loss in LOSSES if settings.device == "cuda" else ():
            figures = on_gpu(trainers[loss], rounds + 1, steps)
            figures["gpu_share_of_step"] = round(figures["gpu_ms"] / step_ms[loss], 3)
            yield row("training step on the GPU", cases[loss], figures)


def on_gpu(made: Trainer, epoch: int, steps: int) -> dict[str, float]:
    """Kernels of a step, their time, and peak memory beyond weights and optimizers; it trains two epochs."""
    made.optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    epochs = iter((epoch, epoch + 1))
    work = gpu_work(lambda: made.train(next(epochs)), "cuda")
    peak = torch.cuda.max_memory_allocated() - before
    made.optimizer.zero_grad()
    return {name: round(value / steps, 3) for name, value in work.items()} | {"peak_extra_bytes": peak}

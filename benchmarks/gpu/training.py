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
STEPS, ROUNDS = 15, 5


def rows(settings: Settings, model: str, batch: int) -> Iterator[dict]:
    """A row a loss."""
    if settings.small:
        model, batch = "ViT-Glyph-32", 8
    steps, rounds = (3, 2) if settings.small else (STEPS, ROUNDS)
    with tempfile.TemporaryDirectory(prefix="gpu-training-") as folder:
        trainers = {loss: trainer(settings, folder, model, batch, steps, rounds + 4, loss) for loss in LOSSES}
        seconds = alternate_epochs(trainers, rounds, settings.device)
        for loss in LOSSES:
            ms = [1e3 * s / steps for s in seconds[loss]]
            q1, ratio, q3 = ratio_quartiles(seconds["clip"], seconds[loss])
            figures = {"step_ms": round(statistics.median(ms), 3), "step_ms_of_rounds": [round(x, 3) for x in ms]}
            figures["samples_per_second"] = round(1e3 * batch / statistics.median(ms), 1)
            figures |= {"samples_ratio_to_clip": round(ratio, 4), "ratio_quartiles": [round(q1, 4), round(q3, 4)]}
            figures |= on_gpu(trainers[loss], rounds + 1, steps, settings.device)
            if "gpu_ms" in figures:
                figures["gpu_share_of_step"] = round(figures["gpu_ms"] / figures["step_ms"], 3)
            yield row("training step", {"model": model, "batch": batch, "loss": loss}, figures)


def on_gpu(made: Trainer, epoch: int, steps: int, device: str) -> dict[str, float]:
    """Kernels and their time in a step, and peak memory beyond weights and optimizers; empty on a CPU."""
    if device != "cuda":
        return {}
    made.optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    epochs = iter(range(epoch, epoch + 2))
    work = gpu_work(lambda: made.train(next(epochs)), device)
    peak = torch.cuda.max_memory_allocated() - before
    made.optimizer.zero_grad()
    return {name: round(value / steps, 3) for name, value in work.items()} | {"peak_extra_bytes": peak}

"""Time of the loss on one rank, beside OpenCLIP's ClipLoss and four bare products (harness/one_rank.py)."""

import gc
import time
from collections.abc import Iterator

import torch

from ..harness.memory import gpu_bytes, peak_extra_bytes
from ..harness.one_rank import FLOOR, OPEN_CLIP, Case, Features, make_step
from ..harness.timing import allow_tf32, gpu_work, step_times, synchronize
from .measurement import Settings, row

SECONDS = 0.15  # of each of the two kinds of timing
CASES = ("256x8192x512", "128x1024x512", "1024x32768x512", "160x5120x512", "256x256x512")
SMALL_CASES = ("16x16x16", "8x32x16")
# name: (kind of features, whether TF32 is allowed, number of the CASES)
MODES = {
    "amp_bf16": ("amp_bf16", True, len(CASES)),
    "bf16 features": ("bf16", True, 2),
    "float32 with TF32": ("float32", True, 2),
    "float32 without TF32": ("float32", False, 1),
}
WARM_UP = 5


def rows(settings: Settings) -> Iterator[dict]:
    """A row a loss, case and mode."""
    for number, text in enumerate(SMALL_CASES if settings.small else CASES):
        torch.compiler.reset()  # each shape is compiled anew, and only so many times
        for mode, (kind, tf32, cases) in MODES.items():
            if number < cases:
                allow_tf32(tf32)
                losses = ("fastclip-v3", "fastclip-v2") if number == 0 and mode == "amp_bf16" else ("fastclip-v3",)
                yield from rows_of_mode(Case.parse(text), mode, kind, losses, settings.device)


def rows_of_mode(case: Case, mode: str, kind: str, losses: tuple[str, ...], device: str) -> Iterator[dict]:
    """OpenCLIP's loss, four products, and ours with the ratios to them."""
    features = Features(case, device, kind)
    others: dict[str, dict] = {}
    for name in (OPEN_CLIP, FLOOR, *losses):
        figures = figures_of(name, case, features, device)
        ratios = {
            f"{key}_over_{other}": round(figures[key] / others[other][key], 3)
            for key in ("idle_ms", "queued_ms", "gpu_ms")
            for other in others
            if key in figures and other != name
        }
        if name in (OPEN_CLIP, FLOOR):
            others[name] = figures
        yield row("loss", {"case": str(case), "mode": mode, "loss": name}, figures | ratios)


def figures_of(name: str, case: Case, features: Features, device: str) -> dict[str, float]:
    """Times, kernels and memory of one loss's step; warm_up_s has the compilation and the recording in it."""
    gc.collect()  # recordings of the last loss, or they would go in the midst of this one
    step = make_step(name, case, features)
    before = gpu_bytes(device)
    start = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    warm_up = time.perf_counter() - start
    figures = {"warm_up_s": round(warm_up, 3)} | step_times(step, device, SECONDS) | gpu_work(step, device)
    return figures | {"peak_extra_bytes": peak_extra_bytes(step, device, before)}

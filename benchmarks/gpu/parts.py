"""The parts of the check, in the order of their worth, with their time limits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from . import accuracy, bare, curves, groups, host_waits, loss_time, resume, training


@dataclass(frozen=True)
class Part:
    """What `rows(settings)` yields within `limit_s` seconds, and which figures its table shows."""

    rows: Callable[..., Iterator[dict]]
    limit_s: int
    shown: tuple[str, ...] = ()


_STEP = ("step_ms", "samples_per_second", "samples_ratio_to_clip", "gpu_share_of_step", "kernels", "peak_extra_bytes")

PARTS = {
    "accuracy": Part(accuracy.rows, 80, ("value", "gradient", "gradient_norm", "state")),
    "vit-b-32": Part(partial(training.rows, model="ViT-B-32", batch=256), 75, _STEP),
    "rn50": Part(partial(training.rows, model="RN50", batch=128), 80, _STEP),
    "loss-time": Part(
        loss_time.rows, 85,
        ("idle_ms", "queued_ms", "host_ms", "gpu_ms", "kernels", "peak_extra_bytes", "queued_ms_over_open-clip",
         "gpu_ms_over_four-matmuls", "warm_up_s"),
    ),
    "resume": Part(resume.rows, 50, ("exit_code", "until_saved_and_ended_s", "saved", "largest_relative_difference")),
    "host-waits": Part(host_waits.rows, 30, ("every_step_of_ours",)),
    "groups": Part(groups.rows, 65, ("largest_error",)),
    "curves": Part(curves.rows, 55),
    "bare": Part(bare.rows, 10, ("queued_ms", "teraflops", "alone_ms", "host_beside_a_busy_gpu_ms")),
}  # fmt: skip
BUDGET_S = 530  # of all, after the imports

"""How long a step takes on a GPU, which works while the host goes on: from idle to idle, one of many, and its kernels.

On a CPU the same functions give the same figures but for what only a GPU has.
"""

import statistics
import time
import warnings
from collections.abc import Callable

import torch

QUEUED = 10  # steps that are given without a wait, as in a training loop that runs ahead of the GPU
LEAST_IDLE, LEAST_QUEUED = 3, 2


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def allow_tf32(allowed: bool = True) -> None:
    """The switch of float32 products, by the name that OpenCLIP's main() uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 has another name for it
        torch.backends.cuda.matmul.allow_tf32 = allowed


def step_times(step: Callable[[], None], device: str, seconds: float) -> dict[str, float]:
    """Milliseconds of a step, medians over about `seconds` each; call it on a step that is warm.

    idle_ms: from an idle device to an idle one; queued_ms: of one of QUEUED steps given without a wait; host_ms: what
    the host takes to give it.
    """
    idle, queued, host = [], [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(idle) < LEAST_IDLE:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        idle.append(time.perf_counter() - start)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(queued) < LEAST_QUEUED:
        start = time.perf_counter()
        for _ in range(QUEUED):
            step()
        host.append((time.perf_counter() - start) / QUEUED)
        synchronize(device)
        queued.append((time.perf_counter() - start) / QUEUED)
    figures = {"idle_ms": idle, "queued_ms": queued, "host_ms": host}
    return {name: round(1e3 * statistics.median(times), 4) for name, times in figures.items()}


def gpu_work(step: Callable[[], None], device: str) -> dict[str, float]:
    """Number of kernels and copies of one step, and milliseconds that they take on the GPU; empty on a CPU."""
    if device != "cuda":
        return {}
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name != "Context Sync"
    ]
    return {
        "kernels": len(events),
        "gpu_ms": round(sum(event.time_range.elapsed_us() for event in events) / 1e3, 4),
    }

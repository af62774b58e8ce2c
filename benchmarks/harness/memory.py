"""Peak memory of a function, beyond what its process held before."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch


def gpu_bytes(device: str) -> int | None:
    """What torch's tensors take on the GPU now; None on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else None


def peak_extra_bytes(function: Callable[[], None], device: str, before: int | None = None) -> int:
    """Most memory during function() minus the memory before it; on the CPU of the process (Linux), else of torch's.

    Call it in a process of its own, after a small run that has loaded all code. before: gpu_bytes() of some time ago,
    so that what earlier calls of the function keep counts as well.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if before is None else before
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory that the process still holds would serve the function
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    before_on_cpu = status_bytes("VmRSS")
    function()
    return status_bytes("VmHWM") - before_on_cpu


def status_bytes(name: str) -> int:
    """An entry of /proc/self/status in bytes: VmRSS, memory now, or VmHWM, its peak (Linux)."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

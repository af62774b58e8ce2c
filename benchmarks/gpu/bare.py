"""What the card itself gives: one product in each arithmetic, and copies of a batch from either kind of memory."""

import time
from collections.abc import Callable, Iterator

import torch

from ..harness.one_rank import Case
from ..harness.timing import allow_tf32, step_times, synchronize
from .measurement import Settings, row

SECONDS = 0.05
CASES = ("256x256x512", "160x5120x512", "256x8192x512", "1024x32768x512")
PRODUCTS = {"float32": (torch.float32, False), "TF32": (torch.float32, True), "bf16": (torch.bfloat16, True)}
BATCHES = {"ids, 8 KB": (1024,), "images, 154 MB": (256, 3, 224, 224)}


def rows(settings: Settings) -> Iterator[dict]:
    """A row a product, and on a GPU a row a copy."""
    for text in ("16x32x16",) if settings.small else CASES:
        case = Case.parse(text)
        for name, (dtype, tf32) in PRODUCTS.items():
            allow_tf32(tf32)
            a, b = (torch.randn(n, case.d, device=settings.device, dtype=dtype) for n in (case.b, case.B))
            ms = step_times(lambda a=a, b=b: torch.mm(a, b.T), settings.device, SECONDS)["queued_ms"]
            flops = 2 * case.b * case.B * case.d
            figures = {"queued_ms": ms, "teraflops": round(flops / ms / 1e9, 1)}
            yield row("one product", {"case": text, "arithmetic": name}, figures)
    if settings.device == "cuda":
        for what, shape in BATCHES.items():
            for kind in ("pageable", "pinned"):
                source = torch.zeros(shape, pin_memory=kind == "pinned")
                yield row("copy to the GPU", {"what": what, "memory": kind}, copy_times(source))


def copy_times(source: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a copy, and of the host in one to a GPU that is busy for a tenth of a second."""

    def timed(wait: Callable[[], None]) -> float:
        start = time.perf_counter()
        source.to("cuda", non_blocking=True)
        wait()
        return round(1e3 * (time.perf_counter() - start), 3)

    def until_done() -> None:
        synchronize("cuda")

    timed(until_done)
    alone = timed(until_done)
    torch.cuda._sleep(200_000_000)
    host = timed(lambda: None)
    until_done()
    return {"alone_ms": alone, "host_beside_a_busy_gpu_ms": host}

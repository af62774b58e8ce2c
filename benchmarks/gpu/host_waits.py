"""Where in a training step the host waits for the GPU, by source line."""

import re
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .command_line import trainer
from .measurement import Settings, row

STEPS, LOG_EVERY = 12, 6
OURS = "open_clip_train_fastclip/"
MOST_OURS = 1  # a step: whether it is finite, before the optimizer moves
OPERATIONS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
CODE = re.compile(r"open_clip_train|/open_clip/|grad_scaler|/optim/|clip_grad")


def rows(settings: Settings) -> Iterator[dict]:
    """A row a loss and precision."""
    count = waits_on_gpu if settings.device == "cuda" else waits_on_cpu
    for loss in ("clip", "fastclip-v3", "fastclip-v2"):
        for precision in ("amp_bf16", "amp") if settings.device == "cuda" else ("amp_bf16",):
            more = ("--precision", precision, "--log-every-n-steps", str(LOG_EVERY))
            with tempfile.TemporaryDirectory(prefix="gpu-waits-") as folder:
                made = trainer(settings, folder, "ViT-Glyph-32", 16, STEPS, 3, loss, *more)
                made.train(0)
                with count() as found:
                    made.train(1)
            every_step = [line for line, times in found.items() if OURS in line and times >= STEPS]
            figures = {"waits": dict(found.most_common()), "every_step_of_ours": every_step}
            case = {"loss": loss, "precision": precision, "steps": STEPS, "log_every": LOG_EVERY}
            ok = len(every_step) <= MOST_OURS if settings.device == "cuda" else None  # ids on a CPU are looked at there
            yield row("host waits", case, figures, ok)


@contextmanager
def waits_on_gpu() -> Iterator[Counter]:
    """What torch warns of, counted by line."""
    found: Counter = Counter()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(
        place(warning.filename, warning.lineno)
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    )


@contextmanager
def waits_on_cpu() -> Iterator[Counter]:
    """Operations at which the host would wait for a GPU, by line; copies are none on a CPU."""
    waits = _Operations()
    with waits:
        yield waits.found


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in OPERATIONS:
            frames = [frame for frame in traceback.extract_stack() if CODE.search(frame.filename)]
            self.found[place(frames[-1].filename, frames[-1].lineno) if frames else "elsewhere"] += 1
        return func(*args, **(kwargs or {}))


def place(filename: str, line: int | None) -> str:
    """A line of a file by its last three names."""
    return f"{'/'.join(Path(filename).parts[-3:])}:{line}"

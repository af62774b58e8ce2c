"""OpenCLIP's .pt files, read without executing what they name; and what ours say of themselves."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def fastclip_note(loss: str, epoch: int) -> dict[str, str | int]:
    """What a .pt says of itself under the key "fastclip": plain values, so that it loads under weights_only=True."""
    return {"loss": loss, "epoch": epoch}


def load_pt(load: Callable[[], Any]) -> Any:
    """What load(), a call of torch.load(weights_only=True), returns, with numpy's numbers in it as plain ones.

    Older training code left its learning rates in the optimizer's groups as numpy scalars, under the module's name of
    numpy 1 or 2.
    """
    scalar: Any = np.float64().__reduce__()[0]
    allowed: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(code)) for code in "fdiq")]
    with torch.serialization.safe_globals(allowed):
        contents = load()
    optimizer = contents.get("optimizer") if isinstance(contents, dict) else None
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    for group in groups if isinstance(groups, list) else ():
        for name, value in group.items() if isinstance(group, dict) else ():
            group[name] = value.item() if isinstance(value, np.generic) else value
    return contents

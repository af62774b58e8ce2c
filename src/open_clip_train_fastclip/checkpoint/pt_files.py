"""OpenCLIP's .pt files, read without executing what they name; and what ours say of themselves."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import one_line

NUMPY_CODES = ("f4", "f8", "i4", "i8")  # of the numbers that older training code left in its optimizer's groups


def with_note(contents: dict[str, Any], loss: str, model: dict[str, Any] | None = None) -> dict[str, Any]:
    """The contents of a checkpoint of one of our losses, with a note under "fastclip" that says so.

    model: the settings that the model was built with. The note is of plain values, so that the file loads under
    weights_only=True.
    """
    note = {"loss": loss, "epoch": contents["epoch"]}
    return {**contents, "fastclip": note if model is None else {**note, "model": model}}


def load_pt(load: Callable[[], Any]) -> Any:
    """What load(), a call of torch.load(weights_only=True), returns, with the numpy numbers of its optimizer plain.

    numpy 1 and 2 spell the module of their scalars differently; both are taken.
    """
    scalar: Any = np.float64().__reduce__()[0]
    allowed: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(code)) for code in NUMPY_CODES)]
    with torch.serialization.safe_globals(allowed):
        contents = load()
    optimizer = contents.get("optimizer") if isinstance(contents, dict) else None
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    for group in groups if isinstance(groups, list) else ():
        for name, value in group.items() if isinstance(group, dict) else ():
            group[name] = value.item() if isinstance(value, np.generic) else value
    return contents


def load_mapped(path: str | Path) -> Any:
    """What load_pt() gives of a file whose tensors stay on the disk until they are used."""
    # torch maps no path that is no UTF-8, but any that leads to the file
    with open(path, "rb") as file:
        name = f"/dev/fd/{file.fileno()}"
        return load_pt(lambda: torch.load(name, mmap=True, map_location="cpu", weights_only=True))


def why_unreadable(error: Exception) -> str:
    """In words, what load_pt() has raised."""
    return (
        "it holds more than tensors and plain values" if isinstance(error, pickle.UnpicklingError) else one_line(error)
    )

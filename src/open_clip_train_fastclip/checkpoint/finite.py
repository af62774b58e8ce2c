"""What is saved must be finite: a checkpoint that cannot train on must not take the place of one that can."""

import math
from typing import Any

import torch
from torch import Tensor


def first_nonfinite(value: Any, name: str = "") -> str | None:
    """Name, like state_dict/visual.proj, of the first tensor in nested dicts and lists that is not finite, if any is.

    A tensor of nothing but 0 and -inf is a mask of attention.
    """
    if isinstance(value, Tensor):
        return None if is_finite(value) or bool(((value == 0) | (value == -math.inf)).all()) else name
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (first_nonfinite(entry, f"{name}/{key}" if name else str(key)) for key, entry in entries)
    return next(filter(None, found), None)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are. Two passes without a copy, where isfinite() makes several: a table may fill a GPU."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = torch.aminmax(tensor.detach())
    return bool(least.isfinite() & most.isfinite())

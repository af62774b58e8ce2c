"""Small operations as few kernels: on a GPU the launches of a step's 150 cost more than their work."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import named_line

_works = True  # until torch.compile has failed once in this process


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled where its first argument is on a GPU, and as it is elsewhere or where that does not work.

    It must be pure: no argument changes, so a call that fails to compile is made again without. Numbers that change
    from step to step must come in tensors, or each new one compiles anew. TORCH_COMPILE_DISABLE=1 switches it off.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(first: Tensor, *rest: Any) -> Any:
        if torch.compiler.is_compiling() or not _pays(first):
            return function(first, *rest)
        try:
            return compiled()(first, *rest)
        except Exception as error:  # a compiler that is missing shows in many ways
            result = function(first, *rest)  # raises what is not of the compiler
            _go_on_without(error)
            return result

    return call


def _pays(tensor: Tensor) -> bool:
    return tensor.is_cuda and _works


def _go_on_without(error: Exception) -> None:
    global _works
    _works = False
    warnings.warn(
        f"torch.compile does not work here, so the loss runs uncompiled, which is slower: {named_line(error)}",
        stacklevel=3,
    )

"""Small operations as few kernels: on a GPU the launches of a step's 150 cost more than their work."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import named_line

_works = True  # until torch.compile has failed once in this process
_wanted = False  # within compiled()


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """Within it what is fused() runs compiled."""
    global _wanted
    before, _wanted = _wanted, True
    try:
        yield
    finally:
        _wanted = before


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled within compiled(), and as it is elsewhere or where that does not work.

    It must be pure: no argument changes, so a call that fails to compile is made again without. Numbers that change
    from step to step must come in tensors, or each new one compiles anew. TORCH_COMPILE_DISABLE=1 switches it off.
    """

    @functools.cache
    def by_torch() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not (_wanted and _works):
            return function(*arguments)
        try:
            return by_torch()(*arguments)
        except Exception as error:  # a compiler that is missing shows in many ways
            result = function(*arguments)  # raises what is not of the compiler
            if "LimitHit" not in type(error).__name__:  # torch compiles so many shapes of one function and no more
                _go_on_without(error)
            return result

    return call


def _go_on_without(error: Exception) -> None:
    global _works
    _works = False
    warnings.warn(
        f"torch.compile does not work here, so the loss runs uncompiled, which is slower: {named_line(error)}",
        stacklevel=3,
    )

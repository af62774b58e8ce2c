"""Calls that repeat, as CUDA graphs: the host of a GPU takes longer to launch a step's small kernels than they take."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import one_line
from .fused import compiled

_works = True  # until a capture has failed once in this process


P = ParamSpec("P")
R = TypeVar("R")


class Recorded(Generic[P, R]):
    """A pure function of tensors that is recorded on a GPU: from the second equal call on it is one launch.

    Equal calls have equal shapes and types and the same other arguments. Their arguments are copied into the
    recording's own. What it returns is overwritten by the next call of it, and is the same object every time; an
    argument that it returns keeps its value until then. Other calls, and those whose first argument is not on a GPU,
    run the function as it is; only what is recorded is compiled (fused.py).
    """

    def __init__(self, function: Callable[P, R]):
        self._function = function
        self._last: list[Any] = []  # the signature of the last call
        self._own: list[Tensor] = []  # tensors among the arguments that the recording reads
        self._result: Any = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, *arguments: P.args, **no_keywords: P.kwargs) -> R:
        """The function's result. Raises what it raises."""
        if not _pays(arguments[0]):
            return self._function(*arguments, **no_keywords)
        leaves = list(_leaves(arguments))
        signature = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
        repeats, tensors = _equal(signature, self._last), [x for x in leaves if isinstance(x, Tensor)]
        if self._replay is None:
            self._last = signature
            if not repeats or not self._record(arguments):
                return self._function(*arguments, **no_keywords)
        elif not repeats:
            return self._function(*arguments, **no_keywords)
        assert self._replay is not None
        for dtype in {tensor.dtype for tensor in tensors}:  # one launch each; mixed lists go one by one
            pairs = [(own, given) for own, given in zip(self._own, tensors, strict=True) if given.dtype == dtype]
            torch._foreach_copy_([own for own, _ in pairs], [given for _, given in pairs])
        self._replay()
        result: R = self._result
        return result

    def __reduce__(self) -> Any:
        return Recorded, (self._function,)  # a copy records its own

    def _record(self, arguments: tuple[Any, ...]) -> bool:
        global _works
        own = _cloned(arguments)  # the caller may change its tensors, and must find them unchanged
        try:
            with compiled():
                self._function(*own)  # type: ignore[call-arg]  # compiles
                self._result, self._replay = _capture(self._function, own)
        except RuntimeError as error:
            _works = False
            warnings.warn(f"no CUDA graph can be made here, so the loss is slower: {one_line(error)}", stacklevel=4)
            return False
        self._own = [leaf for leaf in _leaves(own) if isinstance(leaf, Tensor)]
        return True


def _capture(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Callable[[], None]]:
    """What function(*arguments) returns, still to be filled in, and what fills it in from the same arguments."""
    graph, device = torch.cuda.CUDAGraph(), arguments[0].device
    # thread_local, since the threads that pin batches and watch NCCL go on
    recording = torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
    with torch.cuda.device(device), recording:
        result = function(*arguments)
    return result, graph.replay


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        items = map(_cloned, value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _pays(first: Any) -> bool:
    return isinstance(first, Tensor) and first.is_cuda and _works and not torch.is_inference_mode_enabled()


def _leaves(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _leaves(argument)
        else:
            yield argument


def _equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(_same, left, right))


def _same(left: Any, right: Any) -> bool:
    return left is right or (isinstance(left, tuple) and left == right)

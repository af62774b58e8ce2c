"""Steps with a non-finite feature must not count: no weight, moment or counter of model and optimizer moves in them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .fastclip import FastCLIPLoss

MOST_IN_A_ROW = 10  # bad steps after which a run does not recover by itself


class NonfiniteGuard:
    """Leaves out the optimizer's step when `loss.usable` is False, which it is on all ranks or on none.

    Make it once, before the first step, and call end_step() after each. From then on optimizer.step does nothing in a
    bad step, also when a GradScaler calls it, and end_step() puts back what the forward pass has spoilt: the running
    statistics of batch norms.
    """

    def __init__(self, loss: FastCLIPLoss, optimizer: Optimizer, model: nn.Module):
        self.in_a_row = 0
        on_gpu = loss.usable.is_cuda
        self._usable = torch.ones((), dtype=torch.bool, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self._good_statistics = [buffer.clone() for buffer in self._statistics]
        loss.register_forward_hook(self._fetch_usable)
        # Not a hook that takes the gradients away: several optimizers count steps without them, and Lookahead moves.
        optimizer.step = self._unless_bad(optimizer.step)  # type: ignore[method-assign]

    def end_step(self) -> None:
        """Call it when the optimizer has had its chance; the GradScaler may have passed it over."""
        if self._is_usable():
            self.in_a_row = 0
            _copy(self._statistics, self._good_statistics)
            return
        self.in_a_row += 1
        _copy(self._good_statistics, self._statistics)

    @property
    def too_many(self) -> bool:
        """Whether the run should save and stop, the same on all ranks."""
        return self.in_a_row >= MOST_IN_A_ROW

    def _fetch_usable(self, loss: nn.Module, inputs: Any, output: Any) -> None:
        assert isinstance(loss, FastCLIPLoss)
        self._usable.copy_(loss.usable, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def _is_usable(self) -> bool:
        # The GPU reaches the event when it is done with the loss, and has all of the backward pass still to do, which
        # was given to it before anybody asks here. So the host waits, but the GPU does not wait for the host.
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._usable)

    def _unless_bad(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)  # a GradScaler looks at its parameters
        def step_unless_bad(*args: Any, **kwargs: Any) -> Any:
            return step(*args, **kwargs) if self._is_usable() else None

        return step_unless_bad


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for dtype in {source.dtype for source in sources}:  # one kernel for each; mixed lists go one by one
        pairs = [(s, t) for s, t in zip(sources, targets, strict=True) if s.dtype == dtype]
        torch._foreach_copy_([target for _, target in pairs], [source for source, _ in pairs])

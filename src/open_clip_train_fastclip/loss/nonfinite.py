"""Steps with a non-finite feature: no weight, moment or counter of the model and its optimizer moves in them."""

import functools

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..errors import UserError
from .fastclip import FastCLIPLoss

LIMIT = 10  # bad steps in a row after which there is nothing to hope for


class BadSteps:
    """Leaves out the optimizer's step when `loss.usable` is False, which it is on all ranks or on none.

    Make it once, before the first step, and call end_step() after each. compression: what compress_gradients() gave.
    From then on optimizer.step does nothing in a bad step, also when a GradScaler calls it, and end_step() puts back
    what the forward and backward passes have spoilt: the running statistics of batch norms, PowerSGD's memory.
    """

    def __init__(
        self, loss: FastCLIPLoss, optimizer: Optimizer, model: nn.Module, compression: PowerSGDState | None = None
    ):
        self.in_a_row = 0
        self._compression = compression
        on_gpu = loss.usable.is_cuda
        self._usable = torch.ones((), dtype=torch.bool, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self._good_statistics = [buffer.clone() for buffer in self._statistics]
        loss.register_forward_hook(self._fetch_usable)
        # Not a hook that takes the gradients away: several optimizers count steps without them, and Lookahead moves.
        optimizer.step = self._unless_bad(optimizer.step)

    def end_step(self) -> None:
        """Call it when the optimizer has had its chance; the GradScaler may have passed it over."""
        if self._is_usable():
            self.in_a_row = 0
            _copy(self._statistics, self._good_statistics)
            return
        self.in_a_row += 1
        _copy(self._good_statistics, self._statistics)
        if self._compression is not None:
            for memory in ("error_dict", "p_memory_dict", "q_memory_dict"):
                getattr(self._compression, memory).clear()

    @property
    def too_many(self) -> bool:
        """Whether the run should save and stop, the same on all ranks; see error()."""
        return self.in_a_row >= LIMIT

    def error(self, saved: str) -> UserError:
        """What to raise when there are too many; saved: where the state before the bad steps is."""
        error = UserError(
            f"{LIMIT} steps in a row had features that are not finite and were left out; the state before them is in "
            f"{saved}: go on from it with a lower --lr, --grad-clip-norm, or --precision amp_bf16 or fp32"
        )
        error.on_all_ranks = True
        return error

    def _fetch_usable(self, loss: FastCLIPLoss, inputs, output) -> None:
        self._usable.copy_(loss.usable, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def _is_usable(self) -> bool:
        # The GPU reaches the event when it is done with the loss, and has all of the backward pass still to do, which
        # was given to it before anybody asks here. So the host waits, but the GPU does not wait for the host.
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._usable)

    def _unless_bad(self, step):
        @functools.wraps(step)  # a GradScaler looks at its parameters
        def step_unless_bad(*args, **kwargs):
            return step(*args, **kwargs) if self._is_usable() else None

        return step_unless_bad


def _copy(sources: list, targets: list) -> None:
    for dtype in {source.dtype for source in sources}:  # one kernel for each; mixed lists go one by one
        pairs = [(s, t) for s, t in zip(sources, targets, strict=True) if s.dtype == dtype]
        torch._foreach_copy_([target for _, target in pairs], [source for source, _ in pairs])

"""Steps with a non-finite feature or gradient must not count: nothing of model, optimizer, u or tau moves in them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..ranks import HostCopy
from .fastclip import FastCLIPLoss

MOST_IN_A_ROW = 10  # bad steps after which a run does not recover by itself


class NonfiniteGuard:
    """Leaves out the optimizer's step when a feature (`loss.usable` is False) or a gradient is not finite.

    Make it once, before the first step, and call end_step() after each. From then on optimizer.step does nothing in a
    bad step, also when a GradScaler calls it, and end_step() puts back what the step has spoilt: u, tau and the running
    statistics of batch norms. All ranks judge alike: `usable` is the same on all of them, and so are the gradients that
    DistributedDataParallel has reduced. A GradScaler that is still looking for its scale passes over steps as well:
    they move nothing, and are no fault.

    With torch's AdamW on a GPU and no GradScaler the host waits for nothing: AdamW runs as its fused kernel, which a
    GPU's flag tells to do nothing, and the host learns of a step one step later. Otherwise it waits once a step.
    """

    def __init__(
        self, loss: FastCLIPLoss | None, optimizer: Optimizer, model: nn.Module, scaler: torch.amp.GradScaler | None
    ):
        """loss: None for one that tells nothing of its features; it shows in the gradients then."""
        self.loss, self.optimizer, self.scaler = loss, optimizer, scaler
        self._device = _parameters(optimizer)[0].device
        self._left_out = self._in_a_row = 0
        self._bad: Tensor | None = None  # 0-d bool: whether the step that is under way is left out
        self._last_bad: HostCopy | None = None  # of the step before, until it is counted
        self._passed_over = True  # whether the optimizer has not moved in the step that is under way
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = _Statistics([buffer for module in norms for buffer in module.buffers(recurse=False)])
        # A loss that is OpenCLIP's own keeps its own AdamW, whose last bits differ.
        self._tells_optimizer = loss is not None and scaler is None and _can_be_told(optimizer)
        # Not a hook that takes the gradients away: several optimizers count steps without them, and Lookahead moves.
        optimizer.step = self._unless_bad(optimizer.step)  # type: ignore[method-assign]

    def end_step(self) -> None:
        """Call it when the optimizer has had its chance; the GradScaler may have passed it over."""
        bad = torch.ones((), dtype=torch.bool, device=self._device) if self._bad is None else self._bad
        self._settle()
        if self._tells_optimizer:
            self._last_bad = HostCopy(bad)
        else:
            self._count(self._passed_over)
        if self._tells_optimizer or self._passed_over:
            self._statistics.put_back(bad)
            if self.loss is not None:
                self.loss.undo_step(bad)
        else:
            self._statistics.keep()
        self._bad, self._passed_over = None, True

    @property
    def left_out(self) -> int:
        """Steps in a row in which nothing moved; it waits for the last step."""
        self._settle()
        return self._left_out

    @property
    def in_a_row(self) -> int:
        """Bad ones of them: those in which a scaler looks for its scale are none. It waits for the last step."""
        self._settle()
        return self._in_a_row

    @property
    def too_many(self) -> bool:
        """Whether the run should stop, the same on all ranks; as far as is known without waiting."""
        return self._in_a_row >= MOST_IN_A_ROW and self.in_a_row >= MOST_IN_A_ROW

    def _settle(self) -> None:
        if self._last_bad is not None:
            bad, self._last_bad = bool(self._last_bad.read()), None
            self._count(bad)

    def _count(self, bad: bool) -> None:
        if not bad:
            self._left_out = self._in_a_row = 0
            return
        self._left_out += 1
        if not self._is_looking_for_scale():
            self._in_a_row += 1

    def _is_looking_for_scale(self) -> bool:
        """A scale below 1 makes gradients smaller than they are: then it is not the scale that makes them overflow."""
        if self.scaler is None or self.scaler.get_scale() < 1:
            return False
        return self.loss is None or bool(self.loss.usable)

    def _unless_bad(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)  # a GradScaler looks at its parameters
        def step_unless_bad(*args: Any, **kwargs: Any) -> Any:
            self._bad = self._is_bad()
            if self._tells_optimizer:
                _fuse(self.optimizer)  # load_state_dict() and add_param_group() undo it
                self.optimizer.found_inf = self._bad.float()  # type: ignore[attr-defined]
                return step(*args, **kwargs)
            # The one wait of the host for the GPU in a step: an optimizer cannot be undone.
            self._passed_over = bool(self._bad)
            return None if self._passed_over else step(*args, **kwargs)

        return step_unless_bad

    def _is_bad(self) -> Tensor:
        """0-d bool, where the gradients are."""
        gradients = [parameter.grad for parameter in _parameters(self.optimizer) if parameter.grad is not None]
        bad = torch.zeros((), dtype=torch.bool, device=self._device)
        for device, dtype in {(gradient.device, gradient.dtype) for gradient in gradients}:
            alike = [gradient for gradient in gradients if (gradient.device, gradient.dtype) == (device, dtype)]
            bad = bad | _has_nonfinite(alike).to(self._device)
        return bad if self.loss is None else bad | ~self.loss.usable


def _has_nonfinite(gradients: list[Tensor]) -> Tensor:
    """0-d bool; the gradients are on one device and of one dtype."""
    if gradients[0].dtype == torch.bfloat16:  # of which a GPU has no kernel for what is below
        return ~torch.stack(torch._foreach_norm(gradients, math.inf)).isfinite().all()
    # On a CPU, which reads faster than it writes. The squares of large gradients overflow: those are looked at below.
    if not gradients[0].is_cuda and torch.stack(torch._foreach_norm(gradients)).isfinite().all():
        return torch.tensor(False)
    # What a GradScaler asks, times 1: one pass and few kernels, where a norm makes a tensor of each gradient's.
    found = torch.zeros((), device=gradients[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones_like(found))
    return found > 0


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _can_be_told(optimizer: Optimizer) -> bool:
    """Whether it is an AdamW whose fused kernel a GPU can tell to do nothing."""
    return type(optimizer) is torch.optim.AdamW and all(parameter.is_cuda for parameter in _parameters(optimizer))


def _fuse(optimizer: Optimizer) -> None:
    if all(group["fused"] for group in optimizer.param_groups):
        return
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    for parameter, state in optimizer.state.items():
        if "step" in state:  # of a checkpoint: the fused kernel wants it on the GPU
            state["step"] = state["step"].to(parameter.device, torch.float32)


class _Statistics:
    """Running statistics of batch norms, as they were after the last good step."""

    def __init__(self, tensors: list[Tensor]):
        dtypes = {tensor.dtype for tensor in tensors}
        self._groups = [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes]
        self.keep()

    def keep(self) -> None:
        """The last step was good."""
        self._good = [_flat(group) for group in self._groups]

    def put_back(self, bad: Tensor) -> None:
        """The last step was good or, where `bad`, is undone."""
        good = zip(self._groups, self._good, strict=True)
        self._good = [torch.where(bad, old, _flat(group)) for group, old in good]
        for group, flat in zip(self._groups, self._good, strict=True):
            pieces = flat.split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [p.view_as(t) for p, t in zip(pieces, group, strict=True)])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

"""Steps with a non-finite feature or gradient must not count: nothing of model, optimizer, u or tau moves in them."""

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
    """Leaves out the optimizer's step when a feature (`loss.usable` is False) or a gradient is not finite.

    Make it once, before the first step, and call end_step() after each. From then on optimizer.step does nothing in a
    bad step, also when a GradScaler calls it, and end_step() puts back what the step has spoilt: u, tau and the running
    statistics of batch norms. All ranks judge alike: `usable` is the same on all of them, and so are the gradients that
    DistributedDataParallel has reduced. A GradScaler that is still looking for its scale passes over steps as well:
    they move nothing, and are no fault.
    """

    def __init__(
        self, loss: FastCLIPLoss | None, optimizer: Optimizer, model: nn.Module, scaler: torch.amp.GradScaler | None
    ):
        """loss: None for one that tells nothing of its features; it shows in the gradients then."""
        self.loss, self.optimizer, self.scaler = loss, optimizer, scaler
        self.left_out = 0  # steps in a row in which nothing moved
        self.in_a_row = 0  # bad ones of them: those in which a scaler looks for its scale are none
        self._stepped = False
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self._good_statistics = [buffer.clone() for buffer in self._statistics]
        # Not a hook that takes the gradients away: several optimizers count steps without them, and Lookahead moves.
        optimizer.step = self._unless_bad(optimizer.step)  # type: ignore[method-assign]

    def end_step(self) -> None:
        """Call it when the optimizer has had its chance; the GradScaler may have passed it over."""
        if self._stepped:
            self._stepped, self.left_out, self.in_a_row = False, 0, 0
            _copy(self._statistics, self._good_statistics)
            return
        self.left_out += 1
        if not self._is_looking_for_scale():
            self.in_a_row += 1
        _copy(self._good_statistics, self._statistics)
        if self.loss is not None:
            self.loss.undo_step()

    @property
    def too_many(self) -> bool:
        """Whether the run should stop, the same on all ranks."""
        return self.in_a_row >= MOST_IN_A_ROW

    def _is_looking_for_scale(self) -> bool:
        """A scale below 1 makes gradients smaller than they are: then it is not the scale that makes them overflow."""
        features_are_finite = self.loss is None or bool(self.loss.usable)
        return self.scaler is not None and features_are_finite and self.scaler.get_scale() >= 1

    def _unless_bad(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)  # a GradScaler looks at its parameters
        def step_unless_bad(*args: Any, **kwargs: Any) -> Any:
            # The one wait of the host for the GPU in a step: an optimizer cannot be undone, nor all of them be told
            # on the GPU to do nothing.
            self._stepped = self._all_is_finite()
            return step(*args, **kwargs) if self._stepped else None

        return step_unless_bad

    def _all_is_finite(self) -> bool:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # What a GradScaler asks, times 1: one pass and few kernels, where a norm makes a tensor of each gradient's.
        found = torch.zeros(1, device=gradients[0].device)
        for dtype in {gradient.dtype for gradient in gradients}:
            of_dtype = [gradient for gradient in gradients if gradient.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(of_dtype, found, torch.ones_like(found))
        finite = found == 0
        return bool(finite if self.loss is None else finite & self.loss.usable)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for dtype in {source.dtype for source in sources}:  # one kernel for each; mixed lists go one by one
        pairs = [(s, t) for s, t in zip(sources, targets, strict=True) if s.dtype == dtype]
        torch._foreach_copy_([target for _, target in pairs], [source for source, _ in pairs])

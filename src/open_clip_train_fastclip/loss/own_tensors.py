"""Tensors of a module that are this rank's alone, so that torch's wrappers must neither broadcast nor save them."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ELSEWHERE = (
    "u and tau of a FastCLIPLoss are not in the state_dict, since every rank has another part of them: "
    "open_clip_train_fastclip.save_state(loss, folder, epoch) and load_state(loss, folder) keep them"
)


class OwnTensors(nn.Module):
    """A module whose own() tensors follow it from device to device, and are no buffers.

    DistributedDataParallel gives every rank the buffers of rank 0, and a cast of the model would round them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own_names: list[str] = []

    def own(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor as an attribute of that name."""
        self._own_names.append(name)
        setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OwnTensors":
        super()._apply(fn, recurse)
        for name in self._own_names:
            tensor = getattr(self, name)
            setattr(self, name, tensor.to(fn(tensor[:0] if tensor.dim() else tensor).device))
        return self


class SavedElsewhere(OwnTensors):
    """A module that says, when it is saved or loaded as a state_dict, alone or in another, what that leaves out."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What torch saves of a module: nothing of this one, with a warning."""
        warnings.warn(ELSEWHERE, stacklevel=2)
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(ELSEWHERE, stacklevel=2)
        super()._load_from_state_dict(*args, **kwargs)

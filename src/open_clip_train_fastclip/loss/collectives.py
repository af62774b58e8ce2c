"""What the ranks tell each other in a step of the loss: at most four collectives, packed.

In order: the ids, their rows of the per-sample table, the features, and the new values of u and tau.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 gave it another name, and warns of the old one
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class Collectives:
    """The ranks of torch.distributed's default group, or one rank when it is not initialised."""

    def __init__(self) -> None:
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def gather(self, local: Tensor) -> Tensor:
        """Concatenate the equally shaped `local` [n, ...] of all ranks in rank order: [K * n, ...]. No gradient."""
        if self.world_size == 1:
            return local
        local = local.contiguous()
        everything = local.new_empty(self.world_size * local.shape[0], *local.shape[1:])
        getattr(dist, ALL_GATHER)(everything, local)
        return everything

    def start_sum(self, local: Tensor) -> Callable[[], Tensor]:
        """Begin to add `local` over the ranks, in place; calling the result waits and returns the sum."""
        if self.world_size == 1:
            return lambda: local
        work = dist.all_reduce(local, async_op=True)

        def finished() -> Tensor:
            work.wait()
            return local

        return finished


def gather_packed(collectives: Collectives, *locals_: Tensor) -> list[Tensor]:
    """gather() of several tensors of one dtype in one collective; a 0-d one becomes [K]."""
    if collectives.world_size == 1:
        return [local if local.dim() else local[None] for local in locals_]
    everything = collectives.gather(torch.cat([local.reshape(-1) for local in locals_])[None])
    pieces = everything.split([local.numel() for local in locals_], dim=1)
    return [piece.reshape(-1, *local.shape[1:]) for piece, local in zip(pieces, locals_, strict=True)]

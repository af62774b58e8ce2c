"""Every collective of the loss, packed and counted. At most four a step: ids, rows, features, new values."""

from collections import defaultdict
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel


class Reduction:
    """The ranks of torch.distributed's default group, or one rank when it is not initialised.

    counts[name] = [calls, bytes that this rank gave, bytes that it got], for each collective by its purpose.
    """

    def __init__(self):
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])

    def _count(self, name: str, given: Tensor, got: Tensor) -> None:
        if self.world_size > 1:
            entry = self.counts[name]
            entry[0] += 1
            entry[1] += given.nbytes
            entry[2] += got.nbytes

    def gather(self, name: str, local: Tensor) -> Tensor:
        """Concatenate the equally shaped `local` [n, ...] of all ranks in rank order: [K * n, ...]. No gradient."""
        if self.world_size == 1:
            return local
        local = local.contiguous()
        everything = local.new_empty(self.world_size * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(everything, local)
        self._count(name, local, everything)
        return everything

    def start_sum(self, name: str, local: Tensor) -> Callable[[], Tensor]:
        """Begin to add `local` over the ranks, in place; calling the result waits and returns the sum."""
        if self.world_size == 1:
            return lambda: local
        self._count(name, local, local)
        work = dist.all_reduce(local, async_op=True)

        def finished() -> Tensor:
            work.wait()
            return local

        return finished


def compress_gradients(model: DistributedDataParallel, kind: str) -> powerSGD_hook.PowerSGDState | None:
    """Register torch's hook that compresses DDP's all-reduce of parameter gradients; what it remembers, if anything.

    kind: "none"; "bf16", half the bytes; "powersgd", rank-1 approximations with error feedback (arXiv 1905.13727)
    after torch's default of 1,000 backward passes without.
    """
    if kind == "bf16":
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif kind == "powersgd":
        memory = powerSGD_hook.PowerSGDState(process_group=None)
        model.register_comm_hook(memory, powerSGD_hook.powerSGD_hook)
        return memory
    return None

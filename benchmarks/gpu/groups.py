"""The loss over process groups: NCCL's collectives on one rank, two ranks on one GPU, NCCL over two GPUs."""

import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from open_clip_train_fastclip.loss.collectives import ALL_GATHER, Collectives

from ..harness.processes import in_processes
from . import linear_towers
from .measurement import Settings, relative, row

LOSSES = ("fastclip-v2", "fastclip-v3")  # a temperature of each kind
STEPS = 12
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # after STEPS steps of Adam


class AlwaysCollective(Collectives):
    """Asks the backend also where one rank is alone."""

    def gather(self, local: Tensor) -> Tensor:
        """See Collectives."""
        everything = local.new_empty(self.world_size * local.shape[0], *local.shape[1:])
        getattr(dist, ALL_GATHER)(everything, local.contiguous())
        return everything

    def start_sum(self, local: Tensor) -> Callable[[], Tensor]:
        """See Collectives."""
        work = dist.all_reduce(local, async_op=True)

        def finished() -> Tensor:
            work.wait()
            return local

        return finished


class ThroughTheHost(AlwaysCollective):
    """Over gloo by way of the CPU: NCCL refuses two ranks on one GPU."""

    def gather(self, local: Tensor) -> Tensor:
        """See Collectives."""
        return super().gather(local.cpu()).to(local.device)

    def start_sum(self, local: Tensor) -> Callable[[], Tensor]:
        """See Collectives."""
        finished = super().start_sum(local.cpu())
        return lambda: finished().to(local.device)


def rows(settings: Settings) -> Iterator[dict]:
    """A row a loss and kind of group."""
    device, backend = settings.device, "nccl" if settings.device == "cuda" else "gloo"
    expected = in_processes(1, trajectories, torch.float64, "cpu", None)[0]
    kinds = [("one rank alone", 1, device, torch.float32, None, None)]
    kinds += [(f"one rank, {backend}", 1, device, torch.float32, backend, AlwaysCollective)]
    kinds += [("two ranks through the host", 2, "cpu", torch.float64, None, ThroughTheHost)]
    if device == "cuda" and in_processes(1, torch.cuda.device_count)[0] > 1:
        kinds += [("two ranks, nccl", 2, device, torch.float64, None, AlwaysCollective)]
    for kind, ranks, group_device, dtype, own_backend, collectives in kinds:
        results = in_processes(ranks, trajectories, dtype, device, collectives, own_backend, device=group_device)
        for name in LOSSES:
            errors = [difference(result[name], expected[name]) for result in results]
            case = {"loss": name, "group": kind, "steps": STEPS}
            yield row("group", case, {"largest_error": max(errors)}, max(errors) <= TOLERANCE[dtype])


def trajectories(
    dtype: torch.dtype,
    device: str,
    collectives: type[Collectives] | None,
    backend: str | None = None,
) -> dict[str, linear_towers.Trajectory]:
    """On every rank, by loss. backend: of a group of this process alone."""
    with tempfile.TemporaryDirectory(prefix="gpu-group-") as folder:
        if backend is not None:
            dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        found = {}
        for name in LOSSES:
            # in exact arithmetic: Adam makes a step of any size of a gradient near 0 whose sign is off
            loss = linear_towers.make_loss(name, STEPS, dtype, device, products="exact")
            if collectives is not None:
                loss.collectives = loss.table.collectives = collectives()
            found[name] = linear_towers.train(loss, STEPS, dtype, device)
        if backend is not None:
            dist.destroy_process_group()
    return found


def difference(actual: linear_towers.Trajectory, expected: linear_towers.Trajectory) -> float:
    """The largest relative error of values, weights and u."""
    pairs = [(actual.values, expected.values)]
    pairs += [*zip(actual.weights, expected.weights, strict=True), *zip(actual.log_u, expected.log_u, strict=True)]
    return max(relative(a, e) for a, e in pairs)

"""The loss over process groups: NCCL's collectives on one rank, two ranks on one GPU, NCCL over two GPUs."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from open_clip_train_fastclip.loss import fastclip
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


@dataclass(frozen=True)
class Group:
    """How the towers are trained once: by so many ranks, whose group is made for `made_for`."""

    name: str
    ranks: int
    made_for: str
    dtype: torch.dtype
    collectives: type[Collectives]
    own_backend: str | None = None  # of a group of one rank, which in_processes makes none for


def groups_of(device: str) -> list[Group]:
    """What can be had on this machine."""
    backend = "nccl" if device == "cuda" else "gloo"
    groups = [
        Group("one rank alone", 1, device, torch.float32, Collectives),
        Group(f"one rank, {backend}", 1, device, torch.float32, AlwaysCollective, backend),
        Group("two ranks through the host", 2, "cpu", torch.float64, ThroughTheHost),
    ]
    if device == "cuda" and in_processes(1, torch.cuda.device_count)[0] > 1:
        groups.append(Group("two ranks, nccl", 2, device, torch.float64, AlwaysCollective))
    return groups


def rows(settings: Settings) -> Iterator[dict]:
    """A row a loss and group."""
    alone = Group("the expected", 1, "cpu", torch.float64, Collectives)
    [expected] = in_processes(1, trajectories, alone, "cpu")
    for group in groups_of(settings.device):
        results = in_processes(group.ranks, trajectories, group, settings.device, device=group.made_for)
        for name in LOSSES:
            error = max(difference(result[name], expected[name]) for result in results)
            case = {"loss": name, "group": group.name, "steps": STEPS}
            yield row("group", case, {"largest_error": error}, error <= TOLERANCE[group.dtype])


def trajectories(group: Group, device: str) -> dict[str, linear_towers.Trajectory]:
    """On every rank, by loss."""
    with tempfile.TemporaryDirectory(prefix="gpu-group-") as folder:
        if group.own_backend is not None:
            store = f"file://{folder}/rendezvous"
            dist.init_process_group(group.own_backend, init_method=store, rank=0, world_size=1)
        found = {}
        for name in LOSSES:
            # in exact arithmetic: Adam makes a step of any size of a gradient near 0 whose sign is off
            with patch.object(fastclip, "Collectives", group.collectives):
                loss = linear_towers.make_loss(name, STEPS, group.dtype, device, products="exact")
            found[name] = linear_towers.train(loss, STEPS, group.dtype, device)
        if group.own_backend is not None:
            dist.destroy_process_group()
    return found


def difference(actual: linear_towers.Trajectory, expected: linear_towers.Trajectory) -> float:
    """The largest relative error of values, weights and u."""
    pairs = [(actual.values, expected.values)]
    pairs += [*zip(actual.weights, expected.weights, strict=True), *zip(actual.log_u, expected.log_u, strict=True)]
    return max(relative(a, e) for a, e in pairs)

"""What the ranks of torch.distributed agree on, gather and share out; one process without a group is one rank."""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError, one_line

P = ParamSpec("P")
T = TypeVar("T")
TRIAL = timedelta(minutes=2)  # of gloo: where an address leads nowhere it waits for as long as it may


def is_first_rank() -> bool:
    """Whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_share(items: list[T]) -> list[T]:
    """This rank's part of work that the ranks split; all of it without a process group."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """`value` of every rank, in rank order (collective, over `group`); [value] without torch.distributed."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def gloo_group(timeout: timedelta) -> dist.ProcessGroup | None:
    """A group of all ranks beside the default one, for the CPU (collective); None without torch.distributed.

    Where gloo does not connect all ranks it is the default group, whose timeout is another.
    """
    if not dist.is_initialized():
        return None
    return _new_gloo_group(timeout) if _gloo_connects() else dist.group.WORLD


def _new_gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert not isinstance(group, int)  # the number stands for a group that this rank is not in
    return group


@functools.cache
def _gloo_connects() -> bool:
    """Whether gloo connects all ranks (collective), tried once; if not, a warning on rank 0 names the cure.

    The ranks agree on it over the default group: the first to fail leaves the others waiting until the trial is over.
    """
    failure, trial, begin = "", None, time.monotonic()
    try:
        trial = _new_gloo_group(TRIAL)
        dist.barrier(trial)
    except RuntimeError as error:
        failure = one_line(error)
    tried = gather_objects((time.monotonic() - begin, dist.get_rank(), failure))
    if trial is not None:
        dist.destroy_process_group(trial)
    failures = [(rank, why) for _, rank, why in sorted(tried) if why]
    if failures and is_first_rank():
        rank, why = failures[0]  # the others may only have waited for it
        logging.warning(
            f"gloo does not connect the ranks (rank {rank}: {why}): what they ask each other goes over "
            f"{dist.get_backend()} instead, and an evaluation may not last longer than --dist-timeout: set "
            "GLOO_SOCKET_IFNAME to the network interface by which the hosts reach each other"
        )
    return not failures


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must be that travel over a group: on the CPU for gloo, else on the current GPU."""
    return torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")


class HostCopy:
    """A tensor on its way to the host, which waits for it only where it is read."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event(blocking=True)  # a host that waits leaves its core to the data workers
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The tensor on the CPU: once the GPU has done what it was given before the copy, and nothing given since."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


class Question:
    """The largest of all ranks' numbers: asked at one moment and read at a later one (collective), over `group`.

    Over NCCL reading waits for what the GPU was given before the question, and for nothing that it was given since.
    """

    def __init__(self, numbers: Sequence[int], group: dist.ProcessGroup):
        """numbers: this rank's, each from 0 to 255, the same count on all."""
        device = device_of(group)
        values = torch.tensor(numbers, dtype=torch.uint8)
        if device.type == "cuda":
            values = values.pin_memory().to(device, non_blocking=True)
        self._work = dist.all_reduce(values, dist.ReduceOp.MAX, group=group, async_op=True)
        self._answers: HostCopy | None = None
        self._values = values
        if device.type == "cuda":
            self._work.wait()  # the stream does, not the host
            self._answers = HostCopy(values)

    def wait(self) -> None:
        """Wait until all ranks have asked."""
        if self._answers is None:
            self._work.wait()
        else:
            self._values = self._answers.read()

    def answers(self) -> list[int]:
        """The largest of each of the numbers, once all ranks have asked."""
        self.wait()
        return self._values.tolist()


def agree(check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call check(*args, **kwargs) on every rank; if it raises on any, raise UserError on all. Its result.

    Collective, so that no rank is left waiting for one that has given up.
    """
    return agree_over(None, check, *args, **kwargs)


def agree_over(group: dist.ProcessGroup | None, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """agree() over a process group of torch.distributed with all ranks; None: the default one."""
    message: str | None = None
    mine: Exception | None = None
    result: T
    try:
        result = check(*args, **kwargs)
    except UserError as error:
        message = str(error)
    except Exception as error:  # a bug or a broken machine, on this rank: the others must hear of it, too
        mine, message = error, f"{type(error).__name__}: {error}"
    messages = gather_objects(message, group)
    if mine is not None:
        raise mine
    for message in filter(None, messages):
        raise UserError(message, on_all_ranks=True)
    return result

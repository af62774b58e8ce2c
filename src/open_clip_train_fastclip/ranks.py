"""What the ranks of torch.distributed agree on, gather and share out; one process without a group is one rank."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from .errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


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
    """A group of all ranks beside the default one, for the CPU (collective); None without torch.distributed."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert not isinstance(group, int)  # the number stands for a group that this rank is not in
    return group


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

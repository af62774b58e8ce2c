"""The one exception for what a user can mend, and how the ranks agree on it."""

from collections.abc import Callable

import torch.distributed as dist


class UserError(ValueError):
    """A mistake in the user's input: its text is one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and ends with exit code 2. on_all_ranks: every rank raises the same.
    """

    def __init__(self, text: str, on_all_ranks: bool = False):
        super().__init__(" ".join(text.splitlines()))  # a name in a file may hold line breaks
        self.on_all_ranks = on_all_ranks


def user_message(error: UserError) -> str:
    """The one line of a UserError, also of one that a data worker raised and torch wrapped in a traceback."""
    return str(error).strip().split("UserError: ")[-1].splitlines()[0]


def agree(check: Callable, *args, **kwargs):
    """Call check(*args, **kwargs) on every rank; if it raises on any, raise UserError on all. Its result.

    Collective, so that no rank is left waiting for one that has given up.
    """
    return agree_over(None, check, *args, **kwargs)


def agree_over(group, check: Callable, *args, **kwargs):
    """agree() over a process group of torch.distributed with all ranks; None: the default one."""
    result, mine, message = None, None, None
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
        error = UserError(message)
        error.on_all_ranks = True
        raise error
    return result


def gather_objects(value, group=None) -> list:
    """`value` of every rank, in rank order (collective, over `group`); [value] without torch.distributed."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group)
    return values

"""OpenCLIP's evaluation: on rank 0 alone, and without harm to the training if it fails."""

import argparse
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError, named_line, user_message
from ..ranks import device_of, gloo_group
from .run_args import has_evaluation_data, has_training_data

LIMIT = timedelta(days=1)  # gloo notices at once if rank 0 dies, so it may be long
LONGEST = 1000  # bytes of a failure that are told


class Evaluation:
    """The evaluations of a run."""

    def __init__(self, args: argparse.Namespace):
        """Collective."""
        self.args = args
        self.group = gloo_group(LIMIT) if has_evaluation_data(args) else None
        self.failures: list[str] = []

    def run(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """stock(*args, **kwargs), on rank 0 alone; the others wait for it without --dist-timeout running out.

        In training its failure is a line in the log, since the checkpoint of the epoch is still to be saved.
        """
        failure, metrics = "", {}
        try:
            metrics = stock(*args, **kwargs)
        except Exception as error:  # what an image library, a tokenizer or a full GPU may raise is not one kind
            failure = user_message(error) if isinstance(error, UserError) else named_line(error)
            logging.debug(failure, exc_info=True)
        failure = self._as_on_rank_0(failure)
        if failure:
            self.failures.append(failure)
            if not has_training_data(self.args):
                if dist.is_initialized():
                    dist.barrier()  # rank 0 shall not be gone before the others have heard of it
                self.require_success()
            if self.args.rank == 0:
                logging.error(f"the evaluation failed ({failure}): the epoch is saved, and the run goes on")
        return metrics

    def require_success(self) -> None:
        """Raise UserError, the same on all ranks, if an evaluation has failed."""
        if self.failures:
            trained = "; the training is complete and saved" if has_training_data(self.args) else ""
            times = f" {len(self.failures)} times, first" if len(self.failures) > 1 else ""
            raise UserError(
                f"the evaluation failed{times} ({self.failures[0]}): mend the data that it reads, or leave them out"
                + trained,
                on_all_ranks=True,
            )

    def wait(self) -> None:
        """As long as rank 0 has logs to send."""
        self._as_on_rank_0("")

    def _as_on_rank_0(self, text: str) -> str:
        """The text of rank 0, which waits for the others in its next collective alone, so for --dist-timeout."""
        if self.group is None:
            return text
        content = torch.zeros(LONGEST, dtype=torch.uint8, device=device_of(self.group))
        encoded = bytearray(text.encode(errors="replace")[:LONGEST])
        content[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        work = dist.broadcast(content, 0, self.group, async_op=True)
        if work is not None and self.args.rank != 0:
            work.wait()
        return bytes(content.tolist()).rstrip(b"\0").decode(errors="replace")


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[int | float]:
    """How many of logits [n, classes] have their target [n] among the first k, for each k.

    OpenCLIP's own makes a number of an array of one entry, which numpy 2.4 and newer refuse.
    """
    hits = output.topk(max(topk)).indices == target[:, None]
    return [hits[:, :k].sum().item() for k in topk]

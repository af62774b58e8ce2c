"""Training loaders whose errors end all ranks together: a rank that ends alone leaves the others waiting in a step."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import UserError
from ..ranks import Question, agree, agree_over, gloo_group


class AgreedLoader:
    """A loader's batches; a UserError in place of one is raised on all ranks.

    Collective, as all ranks draw equally many. Each rank tells the others, over ranks.gloo_group(), whether it has its
    next batch. With workers it draws that a step early and reads the answer when the batch is due, so that nobody waits
    for an answer; without, the batch is made when it is due, since making it moves the generators of this process.
    """

    def __init__(self, dataloader: Any, workers: int, timeout: timedelta):
        """dataloader: with num_batches and num_samples, of all ranks. timeout: of waiting for a slower rank."""
        self.dataloader, self.workers = dataloader, workers
        self.num_batches: int = dataloader.num_batches
        self.num_samples: int = dataloader.num_samples
        self._group = gloo_group(timeout)

    def __iter__(self) -> Iterator[Any]:
        """The batches; the places of those that were trained before a resume (None) are left out."""
        batches = (batch for batch in self.dataloader if batch is not None)
        if self._group is None:
            while (batch := agree(next, batches, None)) is not None:
                yield batch
            return
        coming = _Coming(batches, self._group)
        while (batch := coming.batch()) is not None:
            if self.workers:
                coming = _Coming(batches, self._group)
            yield batch
            if not self.workers:
                coming = _Coming(batches, self._group)

    def check(self) -> None:
        """Raise UserError, on all ranks, if the last epoch was none to go on from."""


class _Coming:
    """The next batch of this rank, None at the end, and the question whether all have theirs."""

    def __init__(self, batches: Iterator[Any], group: dist.ProcessGroup):
        self._group = group
        self._batch: Any = None
        self._error: UserError | None = None
        try:
            self._batch = next(batches, None)
        except UserError as error:
            self._error = error
        self._question = Question([self._error is not None], group)

    def batch(self) -> Any:
        if any(self._question.answers()):
            agree_over(self._group, self._raise)
        return self._batch

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

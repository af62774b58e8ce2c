"""Loaders that say what they leave out, and end on all ranks together where it is too much."""

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from ..errors import UserError
from ..ranks import gather_objects, is_first_rank
from .agreed import AgreedLoader
from .tally import Counts, Tally


class CheckedLoader(AgreedLoader):
    """A training loader whose workers keep a tally.

    After 1, 2, 3, 5, 9, ... batches of an epoch's first quarter, and at its end, the ranks add up what was left out. In
    the first quarter that ends the run once it is more than max_unusable of the whole epoch. At the epoch's end it
    makes check() raise, with which the next epoch begins: the trained one is saved by then.
    """

    def __init__(
        self,
        dataloader: Any,
        workers: int,
        timeout: timedelta,
        tally: Tally,
        max_unusable: float,
        epoch: Callable[[], int],
    ):
        """See AgreedLoader; epoch: the number of the running one."""
        super().__init__(dataloader, workers, timeout)
        self.tally, self.max_unusable, self.epoch = tally, max_unusable, epoch
        self._refusal = ""

    def __iter__(self) -> Iterator[Any]:
        """See AgreedLoader."""
        self.check()
        self.tally.begin()
        for number, batch in enumerate(super().__iter__()):
            if number & (number - 1) == 0 and number <= self.num_batches // 4:
                self._check_so_far()
            yield batch
        self._end_epoch()

    def check(self) -> None:
        """Raise UserError, on all ranks, if the last epoch had more unusable samples than it may have."""
        if self._refusal:
            raise UserError(self._refusal, on_all_ranks=True)

    def _total(self) -> Counts:
        total = Counts()
        for counts in gather_objects(self.tally.total()):
            total.add(counts)
        return total

    def _check_so_far(self) -> None:
        total = self._total()
        if self._are_too_many(total):
            raise UserError(f"epoch {self.epoch()}: {self._too_many(total)}", on_all_ranks=True)

    def _end_epoch(self) -> None:
        total = self._total()
        for finding in total.findings() if is_first_rank() else ():
            logging.warning(f"epoch {self.epoch()}: {finding}")
        if self._are_too_many(total):
            self._refusal = f"epoch {self.epoch()}, which is trained and saved: {self._too_many(total)}"

    def _are_too_many(self, total: Counts) -> bool:
        """Whether they are too many of an epoch in which all others are used."""
        not_used = total.unused + total.lost
        return not_used > self.max_unusable * (self.num_samples + not_used)

    def _too_many(self, total: Counts) -> str:
        return (
            f"{'; '.join(total.losses())}; that is more than --max-unusable {self.max_unusable:g} of an epoch: "
            f"{total.cure}, or allow more with --max-unusable and go on with --resume latest"
        )


class EvaluationLoader:
    """A loader for evaluation, which is iterated on rank 0 alone, whose workers keep a tally."""

    def __init__(self, dataloader: Any, tally: Tally):
        self.dataloader, self.tally = dataloader, tally
        self.num_batches: int = dataloader.num_batches
        self.num_samples: int = dataloader.num_samples

    def __iter__(self) -> Iterator[Any]:
        self.tally.begin()
        batches = 0
        for batch in self.dataloader:
            batches += 1
            yield batch
        total = self.tally.total()
        if not batches:
            raise no_evaluation(total)
        for finding in total.findings():
            logging.warning(f"--val-data: {finding}")


def no_evaluation(total: Counts) -> UserError:
    """Why evaluation data make no batch."""
    why = "; ".join(total.findings()) or "its shards are empty"
    return UserError(f"--val-data has no usable sample: {why}: {total.cure}")

"""Between a training loop and the loss: the batches that the loop draws, and what belongs to a step's begin and end.

When the loop asks for the next batch, the step of the last one is complete: the boundary at which a run can be saved.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.position import DataPosition
from ..data.rng import seeded_iterator, set_rng_state
from ..errors import UserError
from ..loss.fastclip import FastCLIPLoss
from ..loss.nonfinite import MOST_IN_A_ROW, NonfiniteGuard
from .checkpointer import AsyncCheckpointer
from .profiling import Trace, profiled
from .progress import LoopSettings, Progress


class ProgressBatches:
    """A loader with a bar (samples/s, time left) on rank 0's terminal; a log file gets the loop's own lines alone."""

    def __init__(self, dataloader: Any, loop: LoopSettings, epoch: int, trace: Trace | None):
        """dataloader: with num_batches and num_samples. trace: where to profile the first epoch to, if anywhere."""
        self.dataloader, self.loop, self.epoch = dataloader, loop, epoch
        self.num_batches: int = dataloader.num_batches
        self.num_samples: int = dataloader.num_samples
        self.first = 0  # number of the first batch of the coming epoch; not 0 if the run was saved inside it
        self._trace = trace

    def __iter__(self) -> Iterator[Any]:
        yield from self._with_bar(self.dataloader)
        self.epoch += 1

    def progress(self, batches: int) -> Progress:
        """Where the run stands with so many batches of the running epoch done."""
        return Progress(self.epoch, batches, self.num_batches, self.loop.accum_freq)

    def _with_bar(self, batches: Iterable[Any], settle: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """settle: waits for the collectives that were launched between two steps."""
        loop = self.loop
        shown = loop.rank == 0 and sys.stderr.isatty()
        per_batch = loop.batch_size * loop.world_size
        with (
            logging_redirect_tqdm() if shown else nullcontext(),
            tqdm(
                total=self.num_batches * per_batch,
                initial=self.first * per_batch,
                unit=" samples",
                unit_scale=True,
                disable=not shown,
            ) as bar,
        ):
            bar.set_description(f"epoch {self.epoch + 1}/{loop.epochs}")
            if self._trace is not None:  # one epoch's steps are enough
                trace, self._trace = self._trace, None
                batches = profiled(batches, trace, (self.num_batches - self.first) // loop.accum_freq, settle)
            for batch in batches:
                yield batch
                bar.update(per_batch)


class StepCallback:
    """What happens around the steps of a loop that can be saved, with any loss."""

    def __init__(self, guard: NonfiniteGuard, checkpointer: AsyncCheckpointer | None):
        self.guard, self.checkpointer = guard, checkpointer

    def before_step(self, ids: Tensor) -> None:
        """The last micro-batch of a step with these samples comes; ids [A*b] int64."""

    def after_step(self, progress: Progress) -> None:
        """A step is complete: judge it."""
        self.guard.end_step()

    def between_steps(self, progress: Progress) -> None:
        """The run may be saved here (collective). Raises Preempted if it is asked to end.

        Raises UserError after too many bad steps in a row.
        """
        guard, checkpointer = self.guard, self.checkpointer
        if guard.too_many:
            cure = "start again" if checkpointer is None else checkpointer.save_before(progress, guard.left_out)
            raise UserError(
                f"{MOST_IN_A_ROW} steps in a row had features or gradients that are not finite and were left out: "
                f"{cure} with a lower --lr, --grad-clip-norm, or --precision amp_bf16 or fp32",
                on_all_ranks=True,
            )
        if checkpointer is not None:
            checkpointer.at_boundary(progress, last_step_is_good=lambda: not guard.left_out)

    def wait(self) -> None:
        """Wait for what was launched at a boundary."""
        if self.checkpointer is not None:
            self.checkpointer.trigger.settle()


class FastCLIPCallback(StepCallback):
    """A FastCLIP loss is told the ids of each step, and its tau goes into the model."""

    def __init__(
        self,
        loss: FastCLIPLoss,
        guard: NonfiniteGuard,
        logit_scale: Tensor,
        checkpointer: AsyncCheckpointer | None,
        log: Callable[[Progress], None],
    ):
        """logit_scale: the model's log(1/tau), which evaluation and checkpoints read. log: called after each step."""
        super().__init__(guard, checkpointer)
        self.loss, self.logit_scale, self.log = loss, logit_scale, log

    def before_step(self, ids: Tensor) -> None:
        """Tell the loss, which begins to fetch their rows of the table."""
        self.loss.begin_step(ids)

    def after_step(self, progress: Progress) -> None:
        """Judge the step, and show everybody the new tau."""
        super().after_step(progress)
        if self.loss.global_tau is not None:
            with torch.no_grad():
                self.logit_scale.copy_(self.loss.global_tau.log_inv_tau)
        self.log(progress)


class ResumableBatches(ProgressBatches):
    """Yields (images, texts), and knows at each step's end how the run can go on.

    `dataloader` yields (images, texts, ids, positions). With accumulation over A batches a step ends with every A-th;
    batches that are left over at an epoch's end are drawn and belong to no step.
    """

    def __init__(self, dataloader: Any, loop: LoopSettings, epoch: int, trace: Trace | None, position: DataPosition):
        """position: this rank's, which keeps track of what `dataloader` yields."""
        super().__init__(dataloader, loop, epoch, trace)
        self.position = position
        self._callback: StepCallback
        self._rng_state: dict[str, Tensor] | None = None

    def bind(self, callback: StepCallback) -> None:
        """What to call around the steps from now on: model, optimizer and loss are made after the batches."""
        self._callback = callback

    def resume(self, first: int, rng_state: dict[str, Tensor] | None) -> None:
        """Begin the coming epoch with batch `first`; `position` is there already.

        rng_state: what rng.rng_state() gave when the batch before it was trained; None: seed the generators anew.
        """
        self.first, self._rng_state = first, rng_state

    def __iter__(self) -> Iterator[Any]:
        callback, accum = self._callback, self.loop.accum_freq
        self.position.start_epoch(self.epoch)
        waiting: list[Tensor] = []
        batches = self._with_bar(self._remaining(), callback.wait)
        for done, (images, texts, ids, positions) in enumerate(batches, self.first + 1):
            self.position.record(ids, positions)
            waiting.append(ids)
            if len(waiting) == accum:
                joined = torch.cat(waiting)
                callback.before_step(joined.pin_memory() if ids.is_pinned() else joined)
                waiting = []
            yield images, texts
            if done % accum == 0:
                callback.after_step(self.progress(done))
                if done < self.num_batches:
                    callback.between_steps(self.progress(done))
        callback.between_steps(self.progress(self.num_batches))
        self.first, self._rng_state = 0, None
        self.epoch += 1

    def _remaining(self) -> Iterator[Any]:
        """The batches that are not trained yet; the first one is made before the generators are put back."""
        for batch in seeded_iterator(self.dataloader, self.loop.seed, self.epoch, self.loop.rank):
            if self._rng_state is not None:
                set_rng_state(self._rng_state, self.loop.device)
                self._rng_state = None
            yield batch

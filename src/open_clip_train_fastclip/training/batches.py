"""Between OpenCLIP's loop and the loss: the batches it draws, the loss it calls, and what belongs to a step's end.

When the loop asks for the next batch, the step of the last one is complete: the boundary at which a run can be saved.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.generators import set_generator_states
from ..data.rng import seeded_iterator
from ..errors import UserError
from ..loss.fastclip import FastCLIPLoss
from ..loss.nonfinite import MOST_IN_A_ROW, NonfiniteGuard
from .checkpointer import SnapshotSaver
from .profiling import profiled
from .save_trigger import Progress


class LoopLoss(nn.Module):
    """FastCLIPLoss as OpenCLIP's loop calls it: features in, a dict of one value out, since the loop adds them up."""

    def __init__(self, fastclip: FastCLIPLoss):
        super().__init__()
        self.fastclip = fastclip

    def forward(self, image_features, text_features, logit_scale=None, output_dict=False):
        """The step's value; tau is the loss's own, so logit_scale, frozen in the model, is not read."""
        value = self.fastclip(image_features, text_features)
        return {"contrastive_loss": value} if output_dict else value


class ProgressBatches:
    """A loader with a bar (samples/s, time left) on rank 0's terminal; a log file gets OpenCLIP's lines alone."""

    def __init__(self, dataloader, args, epoch: int):
        self.dataloader, self.args, self.epoch = dataloader, args, epoch
        self.num_batches, self.num_samples = dataloader.num_batches, dataloader.num_samples
        self.first = 0  # number of the first batch of the coming epoch; not 0 if the run was saved inside it
        self.profile = args.profile  # one epoch's steps are enough

    def __iter__(self):
        yield from self._with_bar(self.dataloader)
        self.epoch += 1

    def _with_bar(self, batches):
        args = self.args
        shown = args.rank == 0 and sys.stderr.isatty()
        per_batch = args.batch_size * args.world_size
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
            bar.set_description(f"epoch {self.epoch + 1}/{args.epochs}")
            if self.profile:
                self.profile = False
                batches = profiled(batches, args, (self.num_batches - self.first) // args.accum_freq, self._settle)
            for batch in batches:
                yield batch
                bar.update(per_batch)

    def _settle(self) -> None:
        """Wait for the collectives that were launched between two steps."""


class ResumableBatches(ProgressBatches):
    """Yields the (images, texts) that OpenCLIP's loop unpacks, and knows at each step's end how the run can go on.

    `dataloader` yields (images, texts, ids, positions), and `position` is this rank's data_position.DataPosition.
    With accumulation over A batches a step ends with every A-th batch.
    """

    def __init__(self, dataloader, args, epoch: int, position):
        super().__init__(dataloader, args, epoch)
        self.position = position
        self.snapshots: SnapshotSaver | None = None  # set if the run writes any
        self.before_first: Callable | None = None  # called with the first images and texts
        self._generators: dict | None = None

    def resume(self, first: int, generators: dict | None) -> None:
        """Begin the coming epoch with batch `first`; `position` is there already.

        generators: what generator_states() gave when the batch before it was trained; None: seed them anew.
        """
        self.first, self._generators = first, generators

    def __iter__(self):
        accum = self.args.accum_freq
        self.position.start_epoch(self.epoch)
        for i, (images, texts, ids, positions) in enumerate(self._with_bar(self._remaining()), self.first):
            if self.before_first is not None:
                self.before_first(images, texts)
                self.before_first = None
            self.position.record(ids, positions)
            self._announce(ids)
            yield images, texts
            if (i + 1) % accum == 0:
                self._end_step(i // accum)
                if i + 1 < self.num_batches:
                    self._boundary(i + 1)
        self._boundary(self.num_batches)
        self.first, self._generators = 0, None
        self.epoch += 1

    def progress(self, batches: int) -> Progress:
        """Where the run stands with so many batches of the running epoch done."""
        return Progress(self.epoch, batches, self.num_batches, self.args.accum_freq)

    def _remaining(self):
        """The batches that are not trained yet; the first one is made before the generators are put back."""
        for batch in seeded_iterator(self.dataloader, self.args.seed, self.epoch, self.args.rank):
            if self._generators is not None:
                set_generator_states(self._generators)
                self._generators = None
            yield batch

    def _announce(self, ids) -> None:
        """A batch with these samples comes."""

    def _end_step(self, i: int) -> None:
        """Step `i` of the epoch is complete."""

    def _boundary(self, batches: int) -> None:
        if self.snapshots is not None:
            self.snapshots.at_boundary(self.progress(batches))

    def _settle(self) -> None:
        if self.snapshots is not None:
            self.snapshots.moments.settle()


class FastCLIPBatches(ResumableBatches):
    """Tells the loss the ids of each step, with its last batch, and does what belongs to the step's end."""

    def __init__(self, dataloader, args, epoch: int, position, model):
        super().__init__(dataloader, args, epoch, position)
        self.model = model
        self.loss: FastCLIPLoss | None = None  # set when it is made
        self.guard: NonfiniteGuard | None = None
        self.tb_writer = None
        self._waiting = []

    def __iter__(self):
        self._waiting = []  # batches left over at an epoch's end are dropped by the loop
        yield from super().__iter__()

    def _announce(self, ids) -> None:
        self._waiting.append(torch.as_tensor(ids))
        if len(self._waiting) == self.args.accum_freq:
            self.loss.begin_step(torch.cat(self._waiting))
            self._waiting = []

    def _boundary(self, batches: int) -> None:
        if self.guard.too_many:
            saved = self.snapshots.save(self.progress(batches)) if self.snapshots else "none, since --logs is none"
            raise UserError(
                f"{MOST_IN_A_ROW} steps in a row had features that are not finite and were left out; the state before "
                f"them is in {saved}: go on from it with a lower --lr, --grad-clip-norm, or --precision amp_bf16 or "
                "fp32",
                on_all_ranks=True,
            )
        super()._boundary(batches)

    def _end_step(self, i: int) -> None:
        """Show evaluation and checkpoints the new tau, and log at the steps at which OpenCLIP logs."""
        self.guard.end_step()
        if self.loss.global_tau is not None:
            with torch.no_grad():
                self.model.logit_scale.copy_(self.loss.global_tau.log_inv_tau)
        args, steps = self.args, self.num_batches // self.args.accum_freq
        if args.rank != 0 or (i % args.log_every_n_steps and i + 1 != steps):
            return
        step = steps * self.epoch + i
        figures = self.loss.metrics()
        text = " ".join(f"{name}: {value:.5g}" for name, value in figures.items())
        logging.info(f"FastCLIP Epoch: {self.epoch} step: {step} {text}")
        figures = {f"fastclip/{name}": value for name, value in figures.items()}
        if self.tb_writer is not None:
            for name, value in figures.items():
                self.tb_writer.add_scalar(name, value, step)
        if args.wandb:
            import wandb

            wandb.log(figures, step=step)

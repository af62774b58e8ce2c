"""Between OpenCLIP's loop and the loss: the batches it draws, the loss it calls, and what belongs to a step's end.

When the loop asks for the next batch, the step of the last one is complete.
"""

import logging
import sys
from contextlib import nullcontext

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .loss import FastCLIPLoss
from .seeding import seeded_iterator


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

    def __iter__(self):
        yield from self._with_bar(self.dataloader)
        self.epoch += 1

    def _with_bar(self, batches):
        args = self.args
        shown = args.rank == 0 and sys.stderr.isatty()
        per_batch = args.batch_size * args.world_size
        with (
            logging_redirect_tqdm() if shown else nullcontext(),
            tqdm(total=self.num_batches * per_batch, unit=" samples", unit_scale=True, disable=not shown) as bar,
        ):
            bar.set_description(f"epoch {self.epoch + 1}/{args.epochs}")
            for batch in batches:
                yield batch
                bar.update(per_batch)


class FastCLIPBatches(ProgressBatches):
    """Yields the (images, texts) that OpenCLIP's loop unpacks, and tells the loss the ids of each step.

    `dataloader` yields (images, texts, ids). With accumulation over A batches the ids of a step are announced
    with its last batch; batches left over at an epoch's end are dropped by the loop and by the loss alike.
    """

    def __init__(self, dataloader, args, epoch: int, model):
        super().__init__(dataloader, args, epoch)
        self.model = model
        self.loss: FastCLIPLoss | None = None  # set when it is made
        self.tb_writer = None

    def __iter__(self):
        accum = self.args.accum_freq
        waiting = []
        batches = seeded_iterator(self.dataloader, self.args.seed, self.epoch, self.args.rank)
        for i, (images, texts, ids) in enumerate(self._with_bar(batches)):
            waiting.append(torch.as_tensor(ids))
            if len(waiting) == accum:
                self.loss.begin_step(torch.cat(waiting))
                waiting = []
            yield images, texts
            if (i + 1) % accum == 0:
                self._end_step(i // accum)
        self.epoch += 1

    def _end_step(self, i: int) -> None:
        """Show evaluation and checkpoints the new tau, and log at the steps at which OpenCLIP logs."""
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

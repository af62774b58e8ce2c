"""What OpenCLIP's training loop calls as its loss, and FastCLIP's own line in the log beside the loop's."""

import argparse
import logging
from typing import Any

from torch import Tensor, nn

from ..loss.fastclip import FastCLIPLoss
from ..training.progress import Progress


class LoopLoss(nn.Module):
    """FastCLIPLoss as OpenCLIP's loop calls it: features in, a dict of one value out, since the loop adds them up."""

    def __init__(self, fastclip: FastCLIPLoss):
        super().__init__()
        self.fastclip = fastclip

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Any = None, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The step's value; tau is the loss's own, so logit_scale, frozen in the model, is not read."""
        value: Tensor = self.fastclip(image_features, text_features)
        return {"contrastive_loss": value} if output_dict else value


class MetricsLog:
    """Logs the loss's figures on rank 0, also to tensorboard and wandb, at the steps at which OpenCLIP logs."""

    def __init__(self, loss: FastCLIPLoss, args: argparse.Namespace, tb_writer: Any):
        self.loss, self.args, self.tb_writer = loss, args, tb_writer

    def __call__(self, progress: Progress) -> None:
        """After a step."""
        args, number = self.args, progress.step - 1
        if args.rank != 0 or (number % args.log_every_n_steps and progress.step != progress.steps_per_epoch):
            return
        step = progress.global_step - 1
        figures = self.loss.metrics()
        text = " ".join(f"{name}: {value:.5g}" for name, value in figures.items())
        logging.info(f"FastCLIP Epoch: {progress.epoch} step: {step} {text}")
        figures = {f"fastclip/{name}": value for name, value in figures.items()}
        if self.tb_writer is not None:
            for name, value in figures.items():
                self.tb_writer.add_scalar(name, value, step)
        if args.wandb:
            import wandb

            wandb.log(figures, step=step)

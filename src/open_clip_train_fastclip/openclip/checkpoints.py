"""What a run saves at an epoch's end and between two steps."""

import argparse
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.atomic import atomic_torch_save
from ..checkpoint.mid_epoch import Header, Layout, RankPart
from ..checkpoint.pt_files import with_note
from ..checkpoint.retention import latest_epoch, prune_states
from ..checkpoint.table import copy_state, save_state, state_dir
from ..data.identity import DataIdentity
from ..data.rng import rng_state
from ..loss.fastclip import FastCLIPLoss
from ..ranks import gloo_group
from ..training.checkpointer import AsyncCheckpointer
from ..training.progress import Progress
from ..training.save_trigger import Interval, SaveTrigger, parse_interval
from ..training.signals import PreemptionSignals
from .pipeline import TrainingData
from .run_args import global_batch_size, has_training_data, is_fastclip, logs_are_written, model_settings

LATEST_IN_THE_MAKING = "tmp.pt"  # OpenCLIP saves this and renames it to epoch_latest.pt


class EpochCheckpoints:
    """What is written at the ends of a run's epochs: OpenCLIP's .pt, and beside it FastCLIP's state."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._latest_epoch: int | None = None  # the epoch that epoch_latest.pt holds

    @property
    def folder(self) -> Path:
        """Of the checkpoints; known once main() has made it."""
        return Path(self.args.checkpoint_path)

    def save(self, contents: dict[str, Any], path: str) -> None:
        """In place of torch.save: atomic, and with a note of the loss in FastCLIP's checkpoints."""
        if is_fastclip(self.args) and Path(path).name == LATEST_IN_THE_MAKING:
            self._latest_epoch = contents["epoch"]
        if is_fastclip(self.args):
            contents = with_note(contents, self.args.loss, model_settings(self.args))
        atomic_torch_save(contents, path)

    def save_state(self, loss: FastCLIPLoss, data: DataIdentity, epoch: int) -> None:
        """Save FastCLIP's state if main() is about to save a .pt with `epoch` epochs done (collective)."""
        args = self.args
        at_frequency = args.save_frequency > 0 and epoch % args.save_frequency == 0
        if not logs_are_written(args) or not (epoch == args.epochs or at_frequency or args.save_most_recent):
            return
        self.prune(writing=epoch)
        save_state(loss, state_dir(self.folder, epoch), epoch, data=data, global_batch_size=global_batch_size(args))

    def prune(self, writing: int | None = None) -> None:
        """Remove the states that no checkpoint names any more, on rank 0; a FastCLIP run's alone."""
        args = self.args
        if not (is_fastclip(args) and has_training_data(args) and logs_are_written(args)) or args.rank != 0:
            return
        if self._latest_epoch is None:
            self._latest_epoch = latest_epoch(self.folder)
        prune_states(self.folder, keep={epoch for epoch in (writing, self._latest_epoch) if epoch is not None})


@dataclass(frozen=True)
class RunState:
    """What there is to save of a run between two steps."""

    args: argparse.Namespace
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    loss: FastCLIPLoss | None  # None with OpenCLIP's own
    data: TrainingData

    def checkpointer(self, signals: PreemptionSignals, start: Progress) -> AsyncCheckpointer:
        """What saves the run from now on, at its `start` or where it goes on (collective)."""
        args = self.args
        interval = parse_interval(args.save_every) if args.save_every else Interval()
        trigger = SaveTrigger(interval, signals, gloo_group(timedelta(seconds=args.dist_timeout)), start)
        folder = Path(args.checkpoint_path)
        return AsyncCheckpointer(folder, self.describe, trigger, keep=args.keep, in_background=args.save_async)

    def describe(self, progress: Progress) -> tuple[Header, RankPart]:
        """What training.checkpointer.AsyncCheckpointer saves, this rank's part copied to the CPU."""
        args = self.args
        header = Header(
            epoch=progress.epoch,
            step=progress.step,
            batches=progress.batches,
            layout=layout_of(args, progress.num_batches),
            seed=args.seed,
            loss=args.loss,
            data=self.data.identity,
        )
        tensors = {"data": self.data.position.tensors(), "generator": rng_state()}
        state = None
        if self.loss is not None:
            state = copy_state(
                self.loss, progress.epoch, data=self.data.identity, global_batch_size=global_batch_size(args)
            )
        contents = self._contents(progress.epoch) if args.rank == 0 else None
        return header, RankPart(args.rank, tensors, state, contents)

    def _contents(self, epoch: int) -> dict[str, Any]:
        """What OpenCLIP saves at an epoch's end, on the CPU."""
        model: Any = getattr(self.model, "_orig_mod", self.model)  # of --torchcompile, without its prefix
        contents = {
            "epoch": epoch,
            "name": self.args.name,
            "state_dict": model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.scaler is not None:
            contents["scaler"] = self.scaler.state_dict()
        copied: dict[str, Any] = _on_cpu(contents)
        return copied if self.loss is None else with_note(copied, self.args.loss, model_settings(self.args))


def _on_cpu(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples, with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, list | tuple) else value


def layout_of(args: argparse.Namespace, num_batches: int) -> Layout:
    """The layout of a run whose epochs have num_batches batches."""
    return Layout(num_batches, args.accum_freq, args.world_size, args.workers, args.batch_size)

"""What a run saves at an epoch's end and between two steps."""

import argparse
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.atomic import atomic_torch_save
from ..checkpoint.finite import first_nonfinite
from ..checkpoint.mid_epoch import Header, Layout, RankPart
from ..checkpoint.pt_files import with_note
from ..checkpoint.retention import latest_epoch, newest_good_checkpoint, prune_states
from ..checkpoint.table import copy_state, nonfinite_column, save_state, state_dir
from ..data.rng import rng_state
from ..errors import UserError
from ..loss.fastclip import FastCLIPLoss
from ..ranks import agree, gloo_group
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
        self.save_most_recent, self.delete_previous = args.save_most_recent, args.delete_previous_checkpoint
        self._held_back: list[Path] = []  # what --delete-previous-checkpoint would have removed after a bad step

    @property
    def folder(self) -> Path:
        """Of the checkpoints; known once main() has made it."""
        return Path(self.args.checkpoint_path)

    def save(self, contents: dict[str, Any], path: str) -> None:
        """In place of torch.save: atomic, and FastCLIP's with a note of the loss and the model."""
        if is_fastclip(self.args) and Path(path).name == LATEST_IN_THE_MAKING:
            self._latest_epoch = contents["epoch"]
        if is_fastclip(self.args):
            contents = with_note(contents, self.args.loss, model_settings(self.args))
        atomic_torch_save(contents, path)

    def end_epoch(self, state: "RunState", epoch: int, is_good: bool = True, is_bad: bool = False) -> bool:
        """Before main() saves a .pt with `epoch` epochs done: that it is good, and FastCLIP's state (collective).

        Whether main() will save one.

        is_good: the last step moved something. If not there is something to save all the same, but it has not been seen
        to train on: nothing goes for it. is_bad: no step of the epoch moved anything, by a fault.

        Raises UserError for a bad epoch, and if what there is to save is not finite.
        """
        args = self.args
        args.save_most_recent = self.save_most_recent and is_good
        args.delete_previous_checkpoint = self.delete_previous and is_good
        at_frequency = args.save_frequency > 0 and epoch % args.save_frequency == 0
        if not logs_are_written(args) or not (epoch == args.epochs or at_frequency or args.save_most_recent):
            return False
        agree(state.require_finite)
        if is_bad:
            raise UserError(
                f"all steps of epoch {epoch - 1} were left out, since features or gradients were not finite, so it is "
                f"not saved: {way_on(self.folder)}",
                on_all_ranks=True,
            )
        self._remove_held_back(epoch, is_good)
        if state.loss is not None and state.data is not None:
            if is_good:
                self.prune(writing=epoch)
            identity, pairs = state.data.identity, global_batch_size(args)
            save_state(state.loss, state_dir(self.folder, epoch), epoch, data=identity, global_batch_size=pairs)
        return True

    def _remove_held_back(self, epoch: int, is_good: bool) -> None:
        """What --delete-previous-checkpoint does not remove after a bad step goes when a good epoch has followed."""
        if self.delete_previous and not is_good:
            self._held_back.append(self.folder / f"epoch_{epoch - 1}.pt")
            return
        for path in self._held_back if self.args.rank == 0 else ():
            path.unlink(missing_ok=True)
        self._held_back = []

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
    data: TrainingData | None  # None if it cannot be saved inside an epoch

    def checkpointer(self, signals: PreemptionSignals, start: Progress, resumed: Path | None) -> AsyncCheckpointer:
        """What saves the run from now on, at its `start` or where it goes on, inside an epoch from `resumed`.

        Collective.
        """
        args = self.args
        interval = parse_interval(args.save_every) if args.save_every else Interval()
        trigger = SaveTrigger(interval, signals, gloo_group(timedelta(seconds=args.dist_timeout)), start)
        return AsyncCheckpointer(
            Path(args.checkpoint_path), self.describe, trigger,
            keep=args.keep, in_background=args.save_async, resumed=resumed,
        )  # fmt: skip

    def describe(self, progress: Progress) -> tuple[Header, RankPart]:
        """What training.checkpointer.AsyncCheckpointer saves, this rank's part copied to the CPU.

        Raises UserError if it is not finite.
        """
        self.require_finite()
        assert self.data is not None  # only such runs are saved between two steps
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
        tensors = {"data": self.data.position.tensors(), "generator": rng_state(torch.device(args.device))}
        state = None
        if self.loss is not None:
            state = copy_state(
                self.loss, progress.epoch, data=self.data.identity, global_batch_size=global_batch_size(args)
            )
        contents = self._contents(progress.epoch) if args.rank == 0 else None
        return header, RankPart(args.rank, tensors, state, contents)

    def require_finite(self) -> None:
        """Raise UserError if weights, the optimizer's moments, tau or this rank's part of the table are not finite."""
        name = first_nonfinite(self._of_model())
        if name is None and self.loss is not None:
            name = nonfinite_column(self.loss)
        if name is not None:
            cure = way_on(Path(self.args.checkpoint_path))
            raise UserError(f"{name} has numbers that are not finite, so nothing is saved: {cure}")

    def _of_model(self) -> dict[str, Any]:
        model: Any = getattr(self.model, "_orig_mod", self.model)  # of --torchcompile, without its prefix
        return {"state_dict": model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _contents(self, epoch: int) -> dict[str, Any]:
        """What OpenCLIP saves at an epoch's end, on the CPU."""
        contents = {"epoch": epoch, "name": self.args.name, **self._of_model()}
        if self.scaler is not None:
            contents["scaler"] = self.scaler.state_dict()
        copied: dict[str, Any] = _on_cpu(contents)
        return copied if self.loss is None else with_note(copied, self.args.loss, model_settings(self.args))


def way_on(checkpoints: Path) -> str:
    """What to do after numbers that are not finite."""
    newest = newest_good_checkpoint(checkpoints)
    start = f"go on from the newest good checkpoint, {newest}," if newest else "start again"
    return f"{start} with a lower --lr, --grad-clip-norm, or --precision amp_bf16 or fp32"


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

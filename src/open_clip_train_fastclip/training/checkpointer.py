"""Saving a run between two steps: when it is time, in which order on the ranks, and before the run ends."""

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ..checkpoint import mid_epoch as snapshot
from ..checkpoint.folders import in_the_making, remove_leftover
from ..checkpoint.table import StateCopy, copy_state
from ..data.generators import generator_states
from ..errors import UserError, agree_over, gather_objects
from ..openclip.saving import Saver
from .save_trigger import Moments, Progress, parse_interval
from .signals import Stopped, StopSignals


@dataclass
class _Save:
    """A snapshot that is being written."""

    folder: Path
    facts: dict
    state: StateCopy | None
    entries: Future  # of this rank


class SnapshotSaver:
    """Saves a run between two steps when it is time, and ends it there if it was asked to.

    A save copies this rank's part to the CPU, writes it in a thread and, when all ranks have done so, gives the folder
    its name. With --save-async training goes on in the meantime, one save at a time. The ranks talk over gloo, so no
    host waits for a device but to copy from it.
    """

    def __init__(self, args, saver: Saver, signals: StopSignals, position, start: Progress):
        """Collective. start: where the run begins; `model`, `optimizer` and `scaler` are set before the first step."""
        self.args, self.saver, self.position = args, saver, position
        self.model = self.optimizer = self.scaler = None
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.dist_timeout))
        interval = parse_interval(args.save_every) if args.save_every else None
        self.moments = Moments(interval, signals, self.group, args.rank == 0, start.global_step)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: _Save | None = None
        self._removal: Future | None = None

    def at_boundary(self, progress: Progress) -> None:
        """Do what it is time for (collective). Raises Stopped on every rank if a signal has come to any."""
        verdict = self.moments.look(progress, self._is_written())
        if self._running is not None and verdict.written:
            self._finish()
        if verdict.stop:
            folder = self.save(progress)
            raise Stopped(f"a signal asked this run to end: it is saved in {folder}, and --resume latest goes on")
        if verdict.save and self._running is None:
            self._begin(progress)
            if not self.args.save_async:
                self._finish()
        self.moments.ask(self._is_written())

    def save(self, progress: Progress) -> Path:
        """Save now and wait until the folder is complete (collective); the folder."""
        self.finish()
        self._begin(progress)
        return self._finish()

    def finish(self) -> None:
        """Wait for a save that is being written (collective)."""
        if self._running is not None:
            self._finish()

    def _is_written(self) -> bool:
        return self._running is not None and self._running.entries.done()

    def _begin(self, progress: Progress) -> None:
        """Copy, and begin to write."""
        args = self.args
        self.moments.saving(progress)
        folder = snapshot.snapshot_dir(self.saver.folder, progress.epoch, progress.step)
        if self._removal is not None:
            self._removal.result()  # it may be of a folder of the same name
        agree_over(self.group, remove_leftover, in_the_making(folder), args.rank == 0)
        tensors = {"data": self.position.tensors(), "generator": generator_states()}
        state = None
        if self.saver.loss is not None:
            state = copy_state(self.saver.loss, **self.saver.state_facts(progress.epoch))
        checkpoint = self._checkpoint(progress.epoch) if args.rank == 0 else None
        part = snapshot.Part(args.rank, args.world_size, tensors, state, checkpoint)
        facts = {
            "epoch": progress.epoch,
            "step": progress.step,
            "batches": progress.batches,
            **snapshot.layout(progress.num_batches, args),
            "seed": args.seed,
            "loss": args.loss,
            "data_hash": self.saver.data_hash,
        }
        self._running = _Save(folder, facts, state, self._thread.submit(snapshot.write_part, part, folder))

    def _checkpoint(self, epoch: int) -> dict:
        """What OpenCLIP saves at an epoch's end, on the CPU."""
        model = getattr(self.model, "_orig_mod", self.model)  # of --torchcompile, without its prefix
        contents = {
            "epoch": epoch,
            "name": self.args.name,
            "state_dict": model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.scaler is not None:
            contents["scaler"] = self.scaler.state_dict()
        return self.saver.noted(_on_cpu(contents))

    def _finish(self) -> Path:
        """Wait until every rank has written its part, then let rank 0 complete the folder and remove old ones."""
        save, self._running = self._running, None
        try:
            entries = gather_objects(agree_over(self.group, save.entries.result), self.group)
            agree_over(self.group, self._complete, save, entries)
        except UserError:
            if self.args.rank == 0:
                shutil.rmtree(in_the_making(save.folder), ignore_errors=True)
            raise
        return save.folder

    def _complete(self, save: _Save, entries: list[dict]) -> None:
        if self.args.rank == 0:
            snapshot.complete(save.folder, save.facts, save.state, entries, self.saver.data_text)
            logging.info(f"saved in {save.folder}")
            # In the thread: removing many GB takes a parallel file system seconds.
            self._removal = self._thread.submit(_remove, snapshot.retire(save.folder, self.args.keep))


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _on_cpu(value):
    """A copy of nested dicts, lists and tuples, with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, list | tuple) else value

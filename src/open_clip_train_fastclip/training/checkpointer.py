"""Saving a run between two steps: when it is time, in which order on the ranks, and before the run ends."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import mid_epoch
from ..checkpoint.atomic import remove_leftover, unfinished
from ..checkpoint.mid_epoch import Header, PartEntries, RankPart
from ..checkpoint.retention import newest_good_checkpoint, prune_mid_epoch
from ..checkpoint.table import StateCopy
from ..errors import UserError
from ..ranks import agree_over, gather_objects, is_first_rank
from .progress import Progress
from .save_trigger import SaveTrigger
from .signals import Preempted


@dataclass
class _Save:
    """A checkpoint that is being written."""

    folder: Path
    header: Header
    state: StateCopy | None
    entries: "Future[PartEntries]"  # of this rank


class AsyncCheckpointer:
    """Saves a run between two steps when it is time, and ends it there if it was asked to.

    A save copies this rank's part to the CPU, writes it in a thread and, when all ranks have done so, gives the folder
    its name. In the background training goes on in the meantime, one save at a time. The ranks talk over the trigger's
    group, which is gloo's where that works, so no host waits for a device but to copy from it.
    """

    def __init__(
        self,
        checkpoints: Path,
        describe: Callable[[Progress], tuple[Header, RankPart]],
        trigger: SaveTrigger,
        *,
        keep: int,
        in_background: bool,
        resumed: Path | None,
    ):
        """checkpoints: the folder of all. describe: what there is to save now, this rank's part copied to the CPU.

        keep: how many of the newest stay. in_background: train on while --save-every writes. resumed: the folder that
        the run goes on from, if it is one of these.
        """
        self.checkpoints, self.describe, self.trigger = checkpoints, describe, trigger
        self.keep, self.in_background = keep, in_background
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: _Save | None = None
        self.saved_step = (
            trigger.last_step
        )  # steps done in the newest checkpoint, also of an epoch's end, or at the start
        self._unproven = resumed  # the newest folder, until a good step shows that its model can go on
        self._removal: Future[None] | None = None

    def at_boundary(self, progress: Progress, last_step_is_good: Callable[[], bool]) -> None:
        """Do what it is time for (collective). Raises Preempted on every rank if a signal has come to any.

        After a bad step nothing is saved, nor removed: both wait for the next good one, and so does the end of the run.
        last_step_is_good: asked only where it matters, since the host may have to wait for the step.
        """
        decision = self.trigger.decide(progress, self._is_written())
        if self._running is not None and decision.written:
            self._finish(self._running)
        if self._running is None and self._unproven is not None and last_step_is_good():
            agree_over(self.trigger.group, self._retire, self._unproven)
            self._unproven = None
        if decision.stop and last_step_is_good():
            folder = self.save(progress)
            raise Preempted(f"a signal asked this run to end: it is saved in {folder}, and --resume latest goes on")
        if decision.save and self._running is None and last_step_is_good():
            save = self._begin(progress)
            if not self.in_background:
                self._finish(save)
        self.trigger.ask(self._is_written())

    def save(self, progress: Progress) -> Path:
        """Save now and wait until the folder is complete (collective); the folder."""
        self.finish()
        return self._finish(self._begin(progress))

    def save_before(self, progress: Progress, bad_steps: int) -> str:
        """Save what was trained before bad steps, in which nothing moved (collective); in words, how to go on."""
        if progress.global_step - bad_steps > self.saved_step:
            return f"go on from the state before them, {self.save(progress)},"
        self.finish()
        newest = newest_good_checkpoint(self.checkpoints)
        return f"go on from {newest}, since which nothing was trained," if newest else "start again"

    def finish(self) -> None:
        """Wait for a save that is being written (collective)."""
        if self._running is not None:
            self._finish(self._running)

    def end(self, last_step_is_good: bool) -> None:
        """The run has ended: wait for what is being written, and remove old ones (collective)."""
        self.finish()
        if self._unproven is not None and last_step_is_good:
            agree_over(self.trigger.group, self._retire, self._unproven)
        if self._removal is not None:
            self._removal.result()

    def _is_written(self) -> bool:
        return self._running is not None and self._running.entries.done()

    def _begin(self, progress: Progress) -> _Save:
        """Copy, and begin to write."""
        self.trigger.saving(progress)
        self.saved_step = progress.global_step
        folder = mid_epoch.mid_epoch_dir(self.checkpoints, progress.epoch, progress.step)
        if self._removal is not None:
            self._removal.result()  # it may be of a folder of the same name
        agree_over(self.trigger.group, remove_leftover, unfinished(folder))
        header, part = agree_over(self.trigger.group, self.describe, progress)
        entries = self._thread.submit(mid_epoch.write_part, part, folder, header.layout.world_size)
        self._running = _Save(folder, header, part.state, entries)
        return self._running

    def _finish(self, save: _Save) -> Path:
        """Wait until every rank has written its part, then let rank 0 complete the folder."""
        self._running = None
        group = self.trigger.group
        try:
            entries = gather_objects(agree_over(group, save.entries.result), group)
            agree_over(group, self._complete, save, entries)
        except UserError:
            if is_first_rank():
                shutil.rmtree(unfinished(save.folder), ignore_errors=True)
            raise
        self._unproven = save.folder
        return save.folder

    def _complete(self, save: _Save, entries: list[PartEntries]) -> None:
        if is_first_rank():
            mid_epoch.complete(save.folder, save.header, save.state, entries)
            logging.info(f"saved in {save.folder}")

    def _retire(self, newest: Path) -> None:
        if is_first_rank():
            # In the thread: removing many GB takes a parallel file system seconds.
            self._removal = self._thread.submit(_remove, prune_mid_epoch(newest, self.keep))


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)

"""What one run writes beside OpenCLIP's checkpoints at an epoch's end, and when it is removed."""

import logging
from pathlib import Path

import torch

from ..checkpoint.atomic import atomic_torch_save, one_line
from ..checkpoint.table import fastclip_note, prune_states, save_state, state_dir
from . import checks

LATEST, LATEST_IN_THE_MAKING = "epoch_latest.pt", "tmp.pt"  # OpenCLIP saves the second and renames it to the first


def latest_epoch(folder: Path) -> int | None:
    """Epochs done in a folder's epoch_latest.pt; None if there is none, or none that can be read."""
    latest = folder / LATEST
    if not latest.exists():
        return None
    try:
        return int(torch.load(latest, mmap=True, map_location="cpu", weights_only=True)["epoch"])
    except Exception as error:  # what the bytes of a foreign file can raise has no end
        logging.warning(f"{latest} is no checkpoint, or cut short ({one_line(error)}): passed over")
        return None


class Saver:
    """Saves for one run; `loss` (FastCLIP's losses only), `data_hash` and `data_text` are set when they are known."""

    def __init__(self, args):
        self.args = args
        self.loss = None
        self.data_hash = ""  # of the data that the ids belong to
        self.data_text: str | None = None  # ShardManifest.text
        self.latest_epoch: int | None = None  # the epoch that epoch_latest.pt holds

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return Path(self.args.checkpoint_path)

    def save_checkpoint(self, contents, path) -> None:
        """In place of torch.save: atomic, and with a note of the loss in FastCLIP's checkpoints."""
        if checks.is_fastclip(self.args) and Path(path).name == LATEST_IN_THE_MAKING:
            self.latest_epoch = contents["epoch"]
        atomic_torch_save(self.noted(contents), path)

    def noted(self, contents: dict) -> dict:
        """The contents of a checkpoint, with the note in it if it is one of FastCLIP's."""
        if not checks.is_fastclip(self.args):
            return contents
        return {**contents, "fastclip": fastclip_note(self.args.loss, contents["epoch"])}

    def state_facts(self, epoch: int) -> dict:
        """What save_state() and copy_state() are told beside the loss, with `epoch` epochs done."""
        return {
            "epoch": epoch,
            "manifest_hash": self.data_hash,
            "settings": self.loss.config.resolved(),
            "global_batch_size": checks.global_batch_size(self.args),
            "data_text": self.data_text,
        }

    def save_state_of_epoch(self, epoch: int) -> None:
        """Save FastCLIP's state if main() is about to save a .pt with `epoch` epochs done (collective)."""
        args = self.args
        at_frequency = args.save_frequency > 0 and epoch % args.save_frequency == 0
        if not checks.logs_are_written(args) or not (epoch == args.epochs or at_frequency or args.save_most_recent):
            return
        self.prune(writing=epoch)
        save_state(self.loss, state_dir(self.folder, epoch), **self.state_facts(epoch))

    def prune(self, writing: int | None = None) -> None:
        """Remove the states that no checkpoint names any more, on rank 0."""
        if self.loss is None or not checks.logs_are_written(self.args) or self.args.rank != 0:
            return
        if self.latest_epoch is None:
            self.latest_epoch = latest_epoch(self.folder)
        prune_states(self.folder, keep={writing, self.latest_epoch} - {None})

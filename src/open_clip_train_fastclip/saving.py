"""What one run writes beside OpenCLIP's checkpoints, and when: the moments of saving and of pruning."""

from pathlib import Path

import torch

from . import checks, params
from .checkpoint import fastclip_note, prune_states, save_state, state_dir
from .durable import atomic_torch_save

LATEST, LATEST_IN_THE_MAKING = "epoch_latest.pt", "tmp.pt"  # OpenCLIP saves the second and renames it to the first


class Saver:
    """Saves for one run; `loss` and `data_hash` are set when they are known (FastCLIP's losses only)."""

    def __init__(self, args):
        self.args = args
        self.loss = None
        self.data_hash = ""  # of the data that the ids belong to
        self.latest_epoch: int | None = None  # the epoch that epoch_latest.pt holds

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return Path(self.args.checkpoint_path)

    def save_checkpoint(self, contents, path) -> None:
        """In place of torch.save: atomic, and with a note of the loss in FastCLIP's checkpoints."""
        if checks.is_fastclip(self.args):
            contents = {**contents, "fastclip": fastclip_note(self.args.loss, contents["epoch"])}
            if Path(path).name == LATEST_IN_THE_MAKING:
                self.latest_epoch = contents["epoch"]
        atomic_torch_save(contents, path)

    def save_state_of_epoch(self, epoch: int) -> None:
        """Save FastCLIP's state if main() is about to save a .pt with `epoch` epochs done (collective)."""
        args = self.args
        at_frequency = args.save_frequency > 0 and epoch % args.save_frequency == 0
        if not checks.logs_are_written(args) or not (epoch == args.epochs or at_frequency or args.save_most_recent):
            return
        self.prune(writing=epoch)
        save_state(
            self.loss,
            state_dir(self.folder, epoch),
            epoch=epoch,
            manifest_hash=self.data_hash,
            settings=params.resolved_settings(self.loss.config),
            global_batch_size=checks.global_batch_size(args),
        )

    def prune(self, writing: int | None = None) -> None:
        """Remove the states that no checkpoint names any more, on rank 0."""
        if self.loss is None or not checks.logs_are_written(self.args) or self.args.rank != 0:
            return
        latest = self.folder / LATEST
        if self.latest_epoch is None and latest.exists():
            self.latest_epoch = torch.load(latest, mmap=True, map_location="cpu", weights_only=True).get("epoch")
        prune_states(self.folder, keep={writing, self.latest_epoch} - {None})

"""Which checkpoints a run has, which one is the newest, and which go.

A folder of checkpoints holds OpenCLIP's epoch_N.pt and epoch_latest.pt, FastCLIP's epoch_N.fastclip/ beside them, and
epoch_E_step_I/ of saves inside an epoch.
"""

import logging
import math
import re
import shutil
from pathlib import Path

from ..errors import UserError
from . import mid_epoch
from .atomic import REPLACED, UNFINISHED, unfinished, writing
from .finite import first_nonfinite
from .index import CHECKPOINT
from .pt_files import load_mapped, why_unreadable

LATEST = "epoch_latest.pt"  # of OpenCLIP's --save-most-recent
DAMAGED = math.inf  # share of the epoch of a mid-epoch checkpoint whose index cannot be read


def mid_epoch_checkpoints(checkpoints: str | Path) -> list[tuple[int, float, Path]]:
    """(epochs done, share of the next one, folder) of the complete mid-epoch checkpoints, the newest last.

    One whose index is damaged has share DAMAGED and is the last of its epoch, so that it is noticed.
    """
    found = []
    for folder in Path(checkpoints).glob("epoch_*_step_*"):
        match = re.fullmatch(rf"epoch_(\d+)_step_\d+({re.escape(REPLACED)})?", folder.name)
        if not match or (match[2] and folder.with_name(folder.name.removesuffix(REPLACED)).exists()):
            continue
        try:
            index = mid_epoch.read_index(folder)
            found.append((index["epoch"], index["batches"] / index["num_batches"], folder))
        except UserError:
            found.append((int(match[1]), DAMAGED, folder))
    return sorted(found)


def all_checkpoints(checkpoints: str | Path) -> list[tuple[int, float, Path]]:
    """(epochs done, share of the next one, path) of what by its name is a run's complete checkpoint, the newest last.

    Raises UserError for an epoch_latest.pt that cannot be read, since its name does not tell how new it is.
    """
    found = _named_checkpoints(checkpoints)
    if (epoch := latest_epoch(checkpoints)) is not None:
        found.append((epoch, 0.0, Path(checkpoints, LATEST)))
    return sorted(found)


def _named_checkpoints(checkpoints: str | Path) -> list[tuple[int, float, Path]]:
    """Those whose names tell their epochs."""
    found = mid_epoch_checkpoints(checkpoints)
    for path in Path(checkpoints).glob("epoch_*.pt"):
        if (match := re.fullmatch(r"epoch_(\d+)\.pt", path.name)) and path.is_file():
            found.append((int(match[1]), 0.0, path))
    return sorted(found)


def newest_checkpoint(checkpoints: str | Path) -> Path | None:
    """What --resume latest goes on from: the checkpoint with most epochs done of those that the run itself has saved.

    Other files in the folder do not count: exported weights, and copies under a name that says another epoch; what
    could be taken for a checkpoint is named in a warning. Raises UserError for the newest one if it cannot be read:
    it may be worth restoring, and going on from an older one would write over what was trained since.
    """
    for epoch, _, path in reversed(all_checkpoints(checkpoints)):
        if path.is_dir() or path.name == LATEST:
            return path
        inside = _epochs_done(path)
        if inside == epoch:
            return path
        holds = "no training state" if inside is None else f"epoch {inside}"
        logging.warning(f"{path} holds {holds}, unlike its name says: passed over")
    return None


def newest_good_checkpoint(checkpoints: str | Path) -> Path | None:
    """The newest checkpoint that can be read, and whose weights and moments are finite: what a message may name."""
    try:
        found = all_checkpoints(checkpoints)
    except UserError:
        found = _named_checkpoints(checkpoints)
    for *_, path in reversed(found):
        try:
            contents = load_mapped(path / CHECKPOINT if path.is_dir() else path)
        except Exception:  # see _epochs_done()
            continue
        if isinstance(contents, dict) and "epoch" in contents and first_nonfinite(contents) is None:
            return path
    return None


def latest_epoch(checkpoints: str | Path) -> int | None:
    """Epochs done in a folder's epoch_latest.pt; None if there is none. Raises UserError if it cannot be read."""
    latest = Path(checkpoints, LATEST)
    return _epochs_done(latest) if latest.exists() else None


def _epochs_done(path: Path) -> int | None:
    """What a .pt file says; None for one without training state. Raises UserError if it cannot be read."""
    try:
        contents = load_mapped(path)
    except Exception as error:  # what the bytes of a foreign file can raise has no end
        raise UserError(
            f"{path} is no checkpoint, or cut short ({why_unreadable(error)}): restore it from a copy, or remove it, "
            "and --resume latest takes the one before it"
        ) from None
    epoch = contents.get("epoch") if isinstance(contents, dict) else None
    return epoch if type(epoch) is int else None


def unfinished_checkpoints(checkpoints: str | Path) -> list[Path]:
    """Mid-epoch checkpoints that are not complete, since the run was killed while it wrote or removed them."""
    return sorted(Path(checkpoints).glob("epoch_*_step_*" + UNFINISHED))


def prune_mid_epoch(written: Path, keep: int) -> list[Path]:
    """Take away the names of all but the newest `keep` mid-epoch checkpoints; what can be removed now.

    written: the newest one that is known to be good, which stays in any case. A damaged one neither counts nor goes.
    For one rank, while nothing is being saved.
    """
    checkpoints = written.parent
    for replaced in checkpoints.glob("epoch_*_step_*" + REPLACED):  # left by a kill while it was removed
        if replaced.with_name(replaced.name.removesuffix(REPLACED)).exists():
            shutil.rmtree(replaced, ignore_errors=True)
    others = [
        folder for _, share, folder in mid_epoch_checkpoints(checkpoints) if folder != written and share != DAMAGED
    ]
    for folder in others[: max(len(others) - keep + 1, 0)]:
        removed = unfinished(folder)  # half of it shall not be taken for a damaged one
        with writing(removed):
            shutil.rmtree(removed, ignore_errors=True)
            folder.rename(removed)
    return unfinished_checkpoints(checkpoints)


def prune_states(checkpoints: str | Path, keep: set[int]) -> None:
    """Remove the states of epochs that neither an epoch_N.pt in the same folder nor `keep` names.

    What interrupted saves left goes as well. For one rank, while nothing is being saved.
    """
    folder = Path(checkpoints)
    epochs = [re.fullmatch(r"epoch_(\d+)\.pt", path.name) for path in folder.glob("epoch_*.pt")]
    named = keep | {int(match[1]) for match in epochs if match}
    for path in folder.glob("epoch_*.fastclip*"):
        match = re.fullmatch(rf"(epoch_(\d+)\.fastclip)({re.escape(UNFINISHED)}|{re.escape(REPLACED)})?", path.name)
        if match is None:
            continue
        is_leftover = match[3] == UNFINISHED or (match[3] == REPLACED and (folder / match[1]).exists())
        if is_leftover or int(match[2]) not in named:
            shutil.rmtree(path, ignore_errors=True)

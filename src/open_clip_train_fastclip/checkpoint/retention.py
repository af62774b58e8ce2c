"""Which checkpoints a run has, which one is the newest, and which go.

A folder of checkpoints holds OpenCLIP's epoch_N.pt and epoch_latest.pt, FastCLIP's epoch_N.fastclip/ beside them, and
epoch_E_step_I/ of saves inside an epoch.
"""

import logging
import math
import re
import shutil
from pathlib import Path

import torch

from ..errors import UserError, one_line
from . import mid_epoch
from .atomic import REPLACED, UNFINISHED, unfinished, writing

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
    """(epochs done, share of the next one, path) of a run's complete checkpoints, the newest last."""
    found = mid_epoch_checkpoints(checkpoints)
    for path in Path(checkpoints).glob("epoch_*.pt"):
        if match := re.fullmatch(r"epoch_(\d+)\.pt", path.name):
            found.append((int(match[1]), 0.0, path))
    if (epoch := latest_epoch(checkpoints)) is not None:
        found.append((epoch, 0.0, Path(checkpoints, LATEST)))
    return sorted(found)


def newest_checkpoint(checkpoints: str | Path) -> Path | None:
    """A run's newest checkpoint, if it was ever saved inside an epoch; else OpenCLIP's own rule holds."""
    return all_checkpoints(checkpoints)[-1][-1] if mid_epoch_checkpoints(checkpoints) else None


def latest_epoch(checkpoints: str | Path) -> int | None:
    """Epochs done in a folder's epoch_latest.pt; None if there is none, or none that can be read."""
    latest = Path(checkpoints, LATEST)
    if not latest.exists():
        return None
    try:
        return int(torch.load(latest, mmap=True, map_location="cpu", weights_only=True)["epoch"])
    except Exception as error:  # what the bytes of a foreign file can raise has no end
        logging.warning(f"{latest} is no checkpoint, or cut short ({one_line(error)}): passed over")
        return None


def unfinished_checkpoints(checkpoints: str | Path) -> list[Path]:
    """Mid-epoch checkpoints that are not complete, since the run was killed while it wrote or removed them."""
    return sorted(Path(checkpoints).glob("epoch_*_step_*" + UNFINISHED))


def prune_mid_epoch(written: Path, keep: int) -> list[Path]:
    """Take away the names of all but the newest `keep` mid-epoch checkpoints; what can be removed now.

    written: the one that stays in any case. A damaged one neither counts nor goes. For one rank, while nothing is being
    saved.
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

"""What --resume loads: the newest checkpoint or a named one, if it fits the run, and how the run goes on from it."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import mid_epoch
from ..checkpoint.finite import first_nonfinite
from ..checkpoint.index import CHECKPOINT, INDEX, MID_EPOCH, Index
from ..checkpoint.mid_epoch import STATE_FOLDER
from ..checkpoint.pt_files import load_pt, why_unreadable
from ..checkpoint.retention import all_checkpoints, newest_checkpoint, newest_good_checkpoint
from ..checkpoint.table import check_same_shards, read_index, state_dir
from ..data.position import resume_position
from ..data.rng import rng_state, set_rng_state
from ..errors import UserError, one_line
from ..ranks import agree
from ..training.batches import ResumableBatches
from .checkpoints import layout_of
from .pipeline import TrainingData
from .run_args import has_training_data, is_fastclip, is_resumable
from .temperature import settle_logit_scale

# -------------------------------------------------------------------- which one, and whether it is sound


@dataclass(frozen=True)
class ResumedRun:
    """What lies beside the weights and the optimizer of a checkpoint."""

    state: tuple[Path, Index] | None  # FastCLIP's: its folder and index
    mid_epoch: tuple[Path, Index] | None  # of a checkpoint inside an epoch: its folder and index


def find_latest(args: argparse.Namespace) -> Path | None:
    """What --resume latest goes on from, for rank 0; None on the others, and for runs that are kept in a remote store.

    Raises UserError if the newest checkpoint cannot be read.
    """
    if args.resume != "latest" or args.remote_sync is not None or not args.name or args.rank != 0:
        return None
    return newest_checkpoint(Path(args.logs, args.name, "checkpoints"))


def _mid_epoch_folder(file_path: str) -> Path | None:
    """The folder of a checkpoint inside an epoch, which can be named by its checkpoint.pt as well."""
    path = Path(file_path)
    if path.name == CHECKPOINT and (path.parent / INDEX).exists():
        return path.parent
    return path if path.is_dir() else None


def check_mid_epoch(file_path: str, args: argparse.Namespace) -> None:
    """Raise UserError if a checkpoint inside an epoch is damaged; the ranks share the reading."""
    folder = _mid_epoch_folder(file_path)
    if folder is None:
        return
    try:
        mid_epoch.check_files(folder, mid_epoch.read_index(folder)["files"][args.rank :: args.world_size])
    except UserError as error:
        raise UserError(f"{error}{_one_before(folder)}") from None


def _one_before(folder: Path) -> str:
    """In words, which checkpoint there is instead of a damaged one."""
    try:
        paths = [path for *_, path in all_checkpoints(folder.parent)]
    except UserError:  # another one is damaged as well
        return ""
    before = paths[: paths.index(folder)] if folder in paths else []
    return f" ({before[-1]} is the one before it: remove {folder}, and --resume latest takes it)" if before else ""


def load_checkpoint(
    pt_load: Callable[..., Any], file_path: str, args: argparse.Namespace, model: nn.Module
) -> tuple[ResumedRun | None, dict[str, Any]]:
    """What belongs to a checkpoint (None for OpenCLIP's losses at an epoch's end) and what main() shall load.

    Raises UserError if the file is missing, damaged, of another model, or of a loss that this run cannot continue.
    """
    folder = _mid_epoch_folder(file_path)
    contents = _read(pt_load, file_path if folder is None else str(folder / CHECKPOINT))
    is_training_state = "epoch" in contents
    weights = contents["state_dict"] if is_training_state else contents
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    _check_fits(weights, model, file_path)
    if has_training_data(args):
        _check_finite(contents, folder or Path(file_path))
    weights_alone = args.fastclip_fresh_state or not is_training_state
    if not weights_alone and not is_fastclip(args) and args.temperature is not None:
        settle_logit_scale(weights, args)
    if weights_alone and has_training_data(args) and (is_fastclip(args) or args.temperature is not None):
        logit_scale: Any = model.logit_scale
        weights["logit_scale"] = logit_scale.detach().clone()  # tau starts anew
    # main() loads into the wrapped model if there are several ranks, whatever the number that wrote the file
    wrapped = args.distributed and not args.horovod
    weights = {("module." if wrapped else "") + name: value for name, value in weights.items()}
    if weights_alone:
        return None, weights
    contents["state_dict"] = weights
    if not has_training_data(args):
        return None, contents  # evaluation needs the weights alone
    _check_continues(contents, file_path, args)
    return _find_state(folder, file_path, contents, args), contents


def _find_state(
    folder: Path | None, file_path: str, contents: dict[str, Any], args: argparse.Namespace
) -> ResumedRun | None:
    if folder is None:
        if not is_fastclip(args):
            return None
        state = state_dir(Path(file_path).parent, contents["epoch"])
        return ResumedRun((state, read_index(state)), None)
    if not is_resumable(args):
        raise UserError(
            f"{folder} was saved inside an epoch, in which --loss {args.loss} goes on only with --save-every: add it"
        )
    inside = folder, mid_epoch.read_index(folder)
    if not is_fastclip(args):
        return ResumedRun(None, inside)
    state = folder / STATE_FOLDER
    return ResumedRun((state, read_index(state)), inside)


def _check_continues(contents: dict[str, Any], file_path: str, args: argparse.Namespace) -> None:
    """Raise UserError if the run cannot go on from a training state with its loss."""
    note = contents.get("fastclip")
    loss, stored = args.loss, note.get("loss") if isinstance(note, dict) else None
    cure = "take its weights alone with --fastclip-fresh-state (new optimizer, epoch 0)"
    optimizer = contents.get("optimizer")
    kinds = {"state": dict, "param_groups": list}
    if not isinstance(optimizer, dict) or not all(isinstance(optimizer.get(n), kind) for n, kind in kinds.items()):
        raise UserError(f"{file_path} holds no optimizer, so it cannot be continued: {cure}")
    if stored and not is_fastclip(args):
        raise UserError(f"{file_path} is of a {stored} run, which --loss {loss} cannot continue: {cure}")
    if is_fastclip(args) and stored != loss:
        whose = f"a {stored}" if stored else "an OpenCLIP"
        raise UserError(f"{file_path} is of {whose} run, without state for --loss {loss}: {cure}")


def _read(pt_load: Callable[..., Any], file_path: str) -> dict[str, Any]:
    try:
        contents = load_pt(lambda: pt_load(file_path, map_location="cpu"))
    except Exception as error:  # what the bytes of a foreign file can raise has no end
        reason = why_unreadable(error)
        raise UserError(f"--resume {file_path} is no checkpoint, or cut short ({reason}): name another one") from None
    weights = contents.get("state_dict", contents) if isinstance(contents, dict) else None
    named = isinstance(weights, dict) and all(isinstance(n, str) and hasattr(v, "shape") for n, v in weights.items())
    if not isinstance(contents, dict) or not named or not weights:
        raise UserError(f"--resume {file_path}: holds no model weights: name a checkpoint of OpenCLIP")
    epoch = contents.get("epoch", 0)
    if type(epoch) is not int or not 0 <= epoch < 2**31:
        raise UserError(f"--resume {file_path}: its epoch is no number: name another checkpoint")
    return contents


def _check_finite(contents: dict[str, Any], path: Path) -> None:
    """Raise UserError for a checkpoint that no training can go on from; earlier versions have saved such ones."""
    name = first_nonfinite(contents)
    if name is not None:
        newest = newest_good_checkpoint(path.parent)
        cure = f"name the newest good checkpoint, {newest}" if newest else "name another one"
        raise UserError(f"--resume {path}: {name} has numbers that are not finite: {cure}")


def _check_fits(weights: dict[str, Any], model: nn.Module, file_path: str) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found == expected:
        return
    name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    raise UserError(
        f"--resume {file_path} is of another model: {name} has shape {found.get(name)}, the model of this run "
        f"{expected.get(name)}: give the --model that it was trained with"
    )


# -------------------------------------------------------------------- going on inside an epoch


def go_on_inside(
    folder: Path, index: Index, batches: ResumableBatches, data: TrainingData, args: argparse.Namespace
) -> None:
    """Let the first epoch begin where it was saved (collective). `batches` are of `data`."""
    agree(_check_same_data, folder, index, data, args)
    layout = vars(layout_of(args, batches.num_batches))
    same_layout = all(index[name] == value for name, value in layout.items())
    first, generator = agree(_put_position, folder, index, same_layout, data, args)
    batches.resume(first, generator)
    if args.rank == 0:
        how = "" if same_layout else " (other ranks, workers or batches: the rest in another order)"
        logging.info(f"going on in epoch {index['epoch']} after {first} of {batches.num_batches} batches{how}")


def _check_same_data(folder: Path, index: Index, data: TrainingData, args: argparse.Namespace) -> None:
    if index["data_hash"] != data.identity.hash:
        known = folder / STATE_FOLDER if is_fastclip(args) else folder
        check_same_shards(known, index["data_hash"], data.identity)
        raise UserError(
            f"{folder} was saved with other training data: go on with the same data and --sample-id, or resume from a "
            "checkpoint of an epoch's end"
        )
    if index["seed"] != args.seed:
        raise UserError(f"{folder} was saved with another order of the data: give --seed {index['seed']}")


def _put_position(
    folder: Path, index: Index, same_layout: bool, data: TrainingData, args: argparse.Namespace
) -> tuple[int, dict[str, Tensor] | None]:
    """Number of the first batch, and the states of this rank's generators then, if the layout is the same.

    Raises UserError also for tensors that nobody here wrote.
    """
    saved = mid_epoch.read_tensors(folder, index)
    device = torch.device(args.device)
    now = rng_state(device)
    try:
        generator = dict(saved[args.rank]["generator"]) if same_layout else None
        if generator is not None:
            set_rng_state(generator, device)  # they fit, so training can put them back
        first = resume_position(
            data.dataloader, data.position, index["epoch"], index["batches"], [rank["data"] for rank in saved],
            same_layout, args.accum_freq, epoch_is_done=index["batches"] == index["num_batches"],
        )  # fmt: skip
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{folder}: a rank's position makes no sense ({one_line(error)}): {MID_EPOCH.cure}") from error
    finally:
        set_rng_state(now, device)
    return first, generator

"""What --resume loads: the newest checkpoint or a named one, if it fits the run, and how the run goes on from it."""

import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import mid_epoch as snapshot
from ..checkpoint.atomic import numpy_numbers_are_plain, one_line
from ..checkpoint.table import check_same_shards, read_index, state_dir
from ..data.generators import generator_states, set_generator_states
from ..data.position import resume_position
from ..errors import UserError, agree
from .checks import has_training_data, is_fastclip, is_resumable
from .saving import LATEST, latest_epoch


@dataclass
class ResumedRun:
    """What lies beside the weights and the optimizer of a checkpoint."""

    folder: Path | None  # of FastCLIP's state
    index: dict | None  # of the state
    snapshot: tuple[Path, dict] | None  # of a checkpoint inside an epoch: its folder and index


# -------------------------------------------------------------------- which one


def checkpoints(folder: str | Path) -> list[tuple[int, float, Path]]:
    """(epochs done, share of the next one, path) of a run's complete checkpoints, the newest last."""
    found = snapshot.snapshots(folder)
    for path in Path(folder).glob("epoch_*.pt"):
        if match := re.fullmatch(r"epoch_(\d+)\.pt", path.name):
            found.append((int(match[1]), 0.0, path))
    if (epoch := latest_epoch(Path(folder))) is not None:
        found.append((epoch, 0.0, Path(folder, LATEST)))
    return sorted(found)


def newest_checkpoint(folder: str | Path) -> str | None:
    """Path of a run's newest checkpoint, if it was ever saved inside an epoch; else OpenCLIP's own rule holds."""
    return str(checkpoints(folder)[-1][-1]) if snapshot.snapshots(folder) else None


def _snapshot_of(file_path: str) -> Path | None:
    """The folder of a checkpoint inside an epoch, which can be named by its checkpoint.pt as well."""
    path = Path(file_path)
    if path.name == snapshot.CHECKPOINT and (path.parent / snapshot.INDEX).exists():
        return path.parent
    return path if path.is_dir() else None


# -------------------------------------------------------------------- whether it is sound


def check_snapshot(file_path: str, args) -> None:
    """Raise UserError if a checkpoint inside an epoch is damaged; the ranks share the reading."""
    folder = _snapshot_of(file_path)
    if folder is None:
        return
    try:
        snapshot.check_files(folder, snapshot.read_index(folder)["files"][args.rank :: args.world_size])
    except UserError as error:
        paths = [path for *_, path in checkpoints(folder.parent)]
        before = paths[: paths.index(folder)] if folder in paths else []
        other = f" ({before[-1]} is the one before it: remove {folder}, and --resume latest takes it)" if before else ""
        raise UserError(f"{error}{other}") from None


def load_checkpoint(pt_load, file_path: str, args, model) -> tuple[ResumedRun | None, dict]:
    """What belongs to a checkpoint (None for OpenCLIP's losses at an epoch's end) and what main() shall load.

    Raises UserError if the file is missing, damaged, of another model, or of a loss that this run cannot continue.
    """
    folder = _snapshot_of(file_path)
    contents = _read(pt_load, file_path if folder is None else str(folder / snapshot.CHECKPOINT))
    is_training_state = "epoch" in contents
    weights = contents["state_dict"] if is_training_state else contents
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    _check_fits(weights, model, file_path)
    weights_alone = args.fastclip_fresh_state or not is_training_state
    if weights_alone and has_training_data(args) and (is_fastclip(args) or args.temperature is not None):
        weights["logit_scale"] = model.logit_scale.detach().clone()  # tau starts anew
    # main() loads into the wrapped model if there are several ranks, whatever the number that wrote the file
    wrapped = args.distributed and not args.horovod
    weights = {("module." if wrapped else "") + name: value for name, value in weights.items()}
    if weights_alone:
        return None, weights
    contents["state_dict"] = weights
    if not has_training_data(args):
        return None, contents  # evaluation needs the weights alone
    _check_continues(contents, file_path, args)
    if folder is None:
        if not is_fastclip(args):
            return None, contents
        state = state_dir(Path(file_path).parent, contents["epoch"])
        return ResumedRun(state, read_index(state), None), contents
    if not is_resumable(args):
        raise UserError(
            f"{folder} was saved inside an epoch, in which --loss {args.loss} goes on only with --save-every: add it"
        )
    inside = folder, snapshot.read_index(folder)
    if not is_fastclip(args):
        return ResumedRun(None, None, inside), contents
    state = folder / snapshot.STATE
    return ResumedRun(state, read_index(state), inside), contents


def _check_continues(contents: dict, file_path: str, args) -> None:
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


def _read(pt_load, file_path: str) -> dict:
    try:
        with numpy_numbers_are_plain():
            contents = pt_load(file_path, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"--resume {file_path}: there is no such file") from None
    except Exception as error:  # what the bytes of a foreign file can raise has no end
        foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if foreign else one_line(error)
        raise UserError(f"--resume {file_path} is no checkpoint, or cut short ({reason}): name another one") from None
    weights = contents.get("state_dict", contents) if isinstance(contents, dict) else None
    named = isinstance(weights, dict) and all(isinstance(n, str) and hasattr(v, "shape") for n, v in weights.items())
    if not named or not weights:
        raise UserError(f"--resume {file_path}: holds no model weights: name a checkpoint of OpenCLIP")
    epoch = contents.get("epoch", 0)
    if type(epoch) is not int or not 0 <= epoch < 2**31:
        raise UserError(f"--resume {file_path}: its epoch is no number: name another checkpoint")
    return contents


def _check_fits(weights: dict, model, file_path: str) -> None:
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


def go_on_inside(folder: Path, index: dict, batches, data, args) -> None:
    """Let the first epoch begin where it was saved (collective). batches: training.ResumableBatches of `data`."""
    agree(_check_same_data, folder, index, data, args)
    saved = snapshot.read_tensors(folder, index)
    layout = snapshot.layout(batches.num_batches, args)
    same_layout = all(index[name] == value for name, value in layout.items())
    first = agree(_put_position, folder, index, saved, data, same_layout, args)
    batches.resume(first, dict(saved[args.rank]["generator"]) if same_layout else None)
    if args.rank == 0:
        how = "" if same_layout else " (other ranks, workers or batches: the rest in another order)"
        logging.info(f"going on in epoch {index['epoch']} after {first} of {batches.num_batches} batches{how}")


def _check_same_data(folder: Path, index: dict, data, args) -> None:
    if index["data_hash"] != data.hash:
        known = folder / snapshot.STATE if is_fastclip(args) else folder
        check_same_shards(known, index["data_hash"], data.text)
        raise UserError(
            f"{folder} was saved with other training data: go on with the same data and --sample-id, or resume from a "
            "checkpoint of an epoch's end"
        )
    if index["seed"] != args.seed:
        raise UserError(f"{folder} was saved with another order of the data: give --seed {index['seed']}")


def _put_position(folder: Path, index: dict, saved: list[dict], data, same_layout: bool, args) -> int:
    """Number of the first batch. Raises UserError also for tensors that nobody here wrote."""
    positions = [tensors["data"] for tensors in saved]
    now = generator_states()
    try:
        if same_layout:
            set_generator_states(saved[args.rank]["generator"])  # they fit, so training can put them back
        return resume_position(
            data.dataloader, data.position, index["epoch"], index["batches"], positions, same_layout,
            args.accum_freq, epoch_is_done=index["batches"] == index["num_batches"],
        )  # fmt: skip
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{folder}: a rank's position makes no sense ({one_line(error)}): {snapshot.CURE}") from error
    finally:
        set_generator_states(now)

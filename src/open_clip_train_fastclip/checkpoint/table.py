"""FastCLIP's state on the disk, beside the checkpoint of the model: written and read by any number of ranks.

A state is a folder. rank-00000-of-00002.safetensors and so on hold the columns of the per-sample table, each rank the
ids that were its own; index.json holds the rest (the loss, N, the data that the ids belong to, the global temperature)
and a checksum of every file. The folder gets its name only when all of it is on the disk, so a state is complete or
it is not there. Reading one executes nothing: it is JSON and safetensors, and both are checked before they are used.
"""

import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data import identity as data_identity
from ..errors import UserError, agree, gather_objects
from .atomic import atomic_torch_save, one_line, writing
from .folders import check_entry, in_the_making, publish, remove_leftover, write_index, write_tensors
from .index import CURE, DTYPES, INDEX, REPLACED, UNFINISHED, present, rank_file, read_index, sealed

__all__ = [
    "atomic_torch_save",
    "fastclip_note",
    "json_key_hash",
    "load_state",
    "prune_states",
    "read_index",
    "save_state",
    "state_dir",
]


PIECE = 2**24  # rows that are copied from a GPU at a time


def state_dir(checkpoints: str | Path, epoch: int) -> Path:
    """The state that belongs to a checkpoint with `epoch` epochs done, also to epoch_latest.pt."""
    return Path(checkpoints) / f"epoch_{epoch}.fastclip"


def json_key_hash(num_samples: int) -> str:
    """manifest_hash of a run whose ids are the json keys of its samples, with a table of num_samples rows."""
    return f"json-key:{num_samples}"


def fastclip_note(loss: str, epoch: int) -> dict:
    """What a .pt says of itself under the key "fastclip": plain values, so that it loads under weights_only=True."""
    return {"loss": loss, "epoch": epoch}


# -------------------------------------------------------------------- saving


@dataclass
class StateCopy:
    """This rank's part of a FastCLIPLoss's state, on the CPU: what is written while the loss trains on."""

    rank: int
    world_size: int
    start: int  # first id of this rank's rows
    stop: int
    columns: dict[str, Tensor]  # [stop - start] each
    content: dict  # of the index, without its files: the same on every rank
    data_text: str | None  # ShardManifest.text


def copy_state(
    loss,
    *,
    epoch: int,
    manifest_hash: str,
    settings: dict,
    global_batch_size: int | None,
    data_text: str | None = None,
) -> StateCopy:
    """The state as it is now; the arguments are those of save_state."""
    table, ranks = loss.table, loss.collectives
    columns = {name: _on_cpu(table.local(name)) for name in table.columns}
    content = {
        "loss": loss.config.loss,
        "epoch": epoch,
        "step": loss.step,
        "num_samples": table.num_samples,
        "manifest_hash": manifest_hash,
        "global_batch_size": global_batch_size,
        "columns": list(table.columns),
        "dtype": _dtype_name(table),
        "tau": loss.tau_state(),
        "settings": settings,
    }
    return StateCopy(ranks.rank, ranks.world_size, table.start, table.stop, columns, content, data_text)


def _on_cpu(column: Tensor) -> Tensor:
    """A copy in pieces, since a GPU makes each contiguous before it sends it: the table may fill half of its memory."""
    copy = torch.empty(len(column), dtype=column.dtype)
    for start in range(0, len(column), PIECE):
        copy[start : start + PIECE] = column[start : start + PIECE]
    return copy


def save_state(loss, folder: str | Path, **facts) -> None:
    """Write the state of a FastCLIPLoss to `folder` (collective). A state of the same name is replaced.

    epoch: epochs done. manifest_hash: identity of the data that the ids belong to. settings: plain values that a
    resumed run uses again. global_batch_size: pairs a step, None if unknown. data_text: ShardManifest.text, if the ids
    are positions in shards. The folder has to be on a file system that all ranks share. Raises UserError on every rank
    if it cannot be written; what was there before stays.
    """
    folder = Path(folder)
    partial = in_the_making(folder)
    is_first = loss.collectives.rank == 0
    try:
        agree(remove_leftover, partial, is_first)
        state = copy_state(loss, **facts)
        files = gather_objects(agree(write_rows, state, partial))
        index = sealed({**state.content, "files": files})
        agree(_complete, folder, partial, index, state.data_text, is_first)
    except UserError:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def write_rows(state: StateCopy, partial: Path) -> dict:
    """Write this rank's rows into the folder in the making; returns the file's entry in the index."""
    path = partial / rank_file(state.rank, state.world_size)
    return {**write_tensors(state.columns, path), "start": state.start, "stop": state.stop}


def _complete(folder: Path, partial: Path, index: dict, data_text: str | None, is_first: bool) -> None:
    """Rank 0: write what is not of one rank and give the folder its name."""
    if is_first:
        with writing(folder):
            finish_state(partial, index, data_text)
            publish(partial, folder)


def finish_state(partial: Path, index: dict, data_text: str | None) -> None:
    """Write what is not of one rank into a state's folder with all its rank files."""
    if data_text is not None:
        data_identity.write(partial, data_text)
    write_index(partial, index)


def prune_states(checkpoints: str | Path, keep: set[int]) -> None:
    """Remove the states of epochs that neither an epoch_N.pt in the same folder nor `keep` names.

    What interrupted saves left goes as well. For one rank, while nothing is being saved.
    """
    folder = Path(checkpoints)
    checkpoints = [re.fullmatch(r"epoch_(\d+)\.pt", path.name) for path in folder.glob("epoch_*.pt")]
    named = keep | {int(match[1]) for match in checkpoints if match}
    for path in folder.glob("epoch_*.fastclip*"):
        match = re.fullmatch(r"(epoch_(\d+)\.fastclip)(\.tmp|\.old)?", path.name)
        if match is None:
            continue
        is_leftover = match[3] == UNFINISHED or (match[3] == REPLACED and (folder / match[1]).exists())
        if is_leftover or int(match[2]) not in named:
            shutil.rmtree(path, ignore_errors=True)


# -------------------------------------------------------------------- loading


def load_state(loss, folder: str | Path, *, manifest_hash: str, data_text: str | None = None) -> dict:
    """Put a saved state into a FastCLIPLoss (collective), on any number of ranks; returns the index.

    Each rank reads only the rows that are its own. data_text: as in save_state. Raises UserError on every rank if a
    file is missing or damaged, or if the state is of another loss, another number of samples, or other data.
    """
    folder = present(folder)
    rank, world_size = loss.collectives.rank, loss.collectives.world_size
    index = agree(_matching_index, loss, folder, manifest_hash, data_text)
    agree(_check_files, folder, index, index["files"][rank::world_size])
    agree(_read_rows, loss.table, folder, index)
    loss.load_tau_state(index["tau"])
    loss.step = index["step"]
    loss.recount()
    return index


def check_same_shards(folder: Path, stored_hash: str, data_text: str | None) -> None:
    """Raise UserError that names the first other shard, if a state's shards are known and are not this run's."""
    difference = data_identity.difference(folder, stored_hash, data_text)
    if difference is not None:
        raise UserError(
            f"{folder} was made with other training data: {difference}: go on with the same shards in the same order, "
            "or take the weights alone with --fastclip-fresh-state"
        )


def _matching_index(loss, folder: Path, manifest_hash: str, data_text: str | None) -> dict:
    """The index, if this loss can go on from it."""
    index = read_index(folder)
    weights_alone = "take the weights alone with --fastclip-fresh-state"
    table = loss.table
    if index["loss"] != loss.config.loss:
        raise UserError(
            f"{folder} is the state of {index['loss']!r} and this run is {loss.config.loss}: "
            f"go on with that loss, or {weights_alone}"
        )
    if index["manifest_hash"] != manifest_hash:
        check_same_shards(folder, index["manifest_hash"], data_text)
    if index["num_samples"] != table.num_samples:
        raise UserError(
            f"{folder} holds {index['num_samples']} samples and this run has {table.num_samples}: "
            f"go on with the same data (or --data-size), or {weights_alone}"
        )
    if index["manifest_hash"] != manifest_hash:
        raise UserError(
            f"{folder} was made with other training data ({index['manifest_hash']!r}, this run has {manifest_hash!r}): "
            f"go on with the same shards in the same order and the same --sample-id, or {weights_alone}"
        )
    layout = (tuple(index["columns"]), index["dtype"], set(index["tau"]))
    if layout != (table.columns, _dtype_name(table), set(loss.tau_state())):
        raise UserError(f"{folder / INDEX} has other columns, another dtype or another tau than its loss has: {CURE}")
    return index


def _check_files(folder: Path, index: dict, entries: list[dict]) -> None:
    """Raise UserError for a file that is not what the index says: bytes, checksum, names, shapes, dtypes."""
    for entry in entries:
        path = folder / entry["name"]
        check_entry(path, entry, CURE)
        with _reading(path), safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        column = (DTYPES[index["dtype"]], [entry["stop"] - entry["start"]])
        if found != dict.fromkeys(index["columns"], column):
            raise UserError(f"{path} holds other columns than its index says: {CURE}")


def _read_rows(table, folder: Path, index: dict) -> None:
    """Fill this rank's part of the table from the files that overlap it."""
    for entry in index["files"]:
        start, stop = max(entry["start"], table.start), min(entry["stop"], table.stop)
        if start >= stop:
            continue
        path = folder / entry["name"]
        with _reading(path), safe_open(path, framework="pt") as file:
            for name in table.columns:
                rows = file.get_slice(name)[start - entry["start"] : stop - entry["start"]]
                table.local(name)[start - table.start : stop - table.start].copy_(rows)


def _dtype_name(table) -> str:
    return str(table.rows.dtype).removeprefix("torch.")


@contextmanager
def _reading(path: Path):
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): {CURE}") from error

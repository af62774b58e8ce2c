"""FastCLIP's state on the disk, beside the checkpoint of the model: written and read by any number of ranks.

A state is a folder. rank-00000-of-00002.safetensors and so on hold the columns of the per-sample table, each rank the
ids that were its own; index.json holds the rest (the loss, N, the data that the ids belong to, the global temperature)
and a checksum of every file; shards.json the names and sizes of the shards, if the ids are positions in them. The
folder gets its name only when all of it is on the disk, so a state is complete or it is not there. Reading one executes
nothing: it is JSON and safetensors, and both are checked before they are used.
"""

import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.identity import DataIdentity, first_difference
from ..errors import UserError
from ..loss.fastclip import FastCLIPLoss
from ..loss.sample_table import U_COLUMNS, SampleTable
from ..ranks import agree, gather_objects, is_first_rank
from . import index as indexes
from .atomic import (
    Entry,
    check_entry,
    commit,
    present,
    reading_tensors,
    remove_leftover,
    sync,
    unfinished,
    write_tensors,
    writing,
)
from .finite import is_finite
from .index import DTYPES, INDEX, STATE, Index, rank_file

SHARDS = "shards.json"  # DataIdentity.text
PIECE = 2**24  # rows that are copied from a GPU at a time
UNKNOWN = DataIdentity("")  # of a training loop that does not say which data its ids belong to


def state_dir(checkpoints: str | Path, epoch: int) -> Path:
    """The state that belongs to a checkpoint with `epoch` epochs done, also to epoch_latest.pt."""
    return Path(checkpoints) / f"epoch_{epoch}.fastclip"


def read_index(folder: str | Path) -> Index:
    """The checked contents of a state's index.json. Raises UserError if it is missing, damaged or not one of ours."""
    return indexes.read(STATE, present(folder))


# -------------------------------------------------------------------- saving


@dataclass
class StateCopy:
    """This rank's part of a FastCLIPLoss's state, on the CPU: what is written while the loss trains on."""

    rank: int
    world_size: int
    start: int  # first id of this rank's rows
    stop: int
    columns: dict[str, Tensor]  # [stop - start] each
    content: Index  # without its files: the same on every rank
    data: DataIdentity


def copy_state(
    loss: FastCLIPLoss,
    epoch: int,
    *,
    data: DataIdentity = UNKNOWN,
    settings: dict[str, Any] | None = None,
    global_batch_size: int | None = None,
) -> StateCopy:
    """The state as it is now; the arguments are those of save_state."""
    table, ranks = loss.table, loss.collectives
    content = {
        "loss": loss.config.loss,
        "epoch": epoch,
        "step": loss.step,
        "num_samples": table.num_samples,
        "manifest_hash": data.hash,
        "global_batch_size": global_batch_size,
        "columns": list(table.columns),
        "dtype": _dtype_name(table),
        "tau": loss.tau_state(),
        "settings": loss.config.resolved() if settings is None else settings,
    }
    columns = {name: _on_cpu(table.local(name)) for name in table.columns}
    return StateCopy(ranks.rank, ranks.world_size, table.start, table.stop, columns, content, data)


def nonfinite_column(loss: FastCLIPLoss) -> str | None:
    """Name of a column of this rank's rows, or of a number of the global tau, that is not finite, if there is one.

    log u of a sample that was never seen is -inf.
    """
    for name, value in loss.tau_state().items():
        if not math.isfinite(value):
            return f"tau's {name}"
    for name in loss.table.columns:
        column = loss.table.local(name)
        is_sound = not len(column) or bool(column.max() < math.inf) if name in U_COLUMNS else is_finite(column)
        if not is_sound:
            return f"the table's {name}"
    return None


def _require_finite(loss: FastCLIPLoss) -> None:
    name = nonfinite_column(loss)
    if name is not None:
        raise UserError(f"{name} has numbers that are not finite, so no state is saved: go on from an earlier one")


def _on_cpu(column: Tensor) -> Tensor:
    """A copy in pieces, since a GPU makes each contiguous before it sends it: the table may fill half of its memory."""
    copy = torch.empty(len(column), dtype=column.dtype)
    for start in range(0, len(column), PIECE):
        copy[start : start + PIECE] = column[start : start + PIECE]
    return copy


def save_state(
    loss: FastCLIPLoss,
    folder: str | Path,
    epoch: int,
    *,
    data: DataIdentity = UNKNOWN,
    settings: dict[str, Any] | None = None,
    global_batch_size: int | None = None,
) -> None:
    """Write the state of a FastCLIPLoss to `folder` (collective). A state of the same name is replaced.

    epoch: epochs done. data: which data the ids belong to. settings: plain values that a resumed run uses again, by
    default those of the loss's config. global_batch_size: pairs a step, None if unknown. The folder has to be on a
    file system that all ranks share. Raises UserError on every rank if it cannot be written, or if u or tau are not
    finite; what was there before stays.
    """
    folder = Path(folder)
    partial = unfinished(folder)
    agree(_require_finite, loss)
    try:
        agree(remove_leftover, partial)
        state = copy_state(loss, epoch, data=data, settings=settings, global_batch_size=global_batch_size)
        entries = gather_objects(agree(write_rows, state, partial))
        agree(_complete, folder, state, entries)
    except UserError:
        if is_first_rank():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def write_rows(state: StateCopy, partial: Path) -> Entry:
    """Write this rank's rows into the unfinished folder; returns the file's entry in the index."""
    path = partial / rank_file(state.rank, state.world_size)
    return {**write_tensors(state.columns, path), "start": state.start, "stop": state.stop}


def _complete(folder: Path, state: StateCopy, entries: list[Entry]) -> None:
    """Rank 0: write what is not of one rank and give the folder its name."""
    if is_first_rank():
        with writing(folder):
            finish_state(unfinished(folder), state, entries)
            commit(unfinished(folder), folder)


def finish_state(partial: Path, state: StateCopy, entries: list[Entry]) -> None:
    """Write what is not of one rank into a state's folder; entries: what write_rows() returned, in rank order."""
    write_shards(partial, state.data)
    indexes.write(partial, indexes.sealed(STATE, {**state.content, "files": entries}))


def write_shards(partial: Path, data: DataIdentity) -> None:
    """Put the names and sizes of the shards into a folder, synced, if the ids are positions in shards."""
    if data.text is not None:
        (partial / SHARDS).write_text(data.text)
        sync(partial / SHARDS)


# -------------------------------------------------------------------- loading


def load_state(loss: FastCLIPLoss, folder: str | Path, data: DataIdentity = UNKNOWN) -> Index:
    """Put a saved state into a FastCLIPLoss (collective), on any number of ranks; returns the index.

    Each rank reads only the rows that are its own. data: which data this run's ids belong to; not compared if unknown.
    Raises UserError on every rank if a file is missing or damaged, or if the state is of another loss, another number
    of samples, or other data.
    """
    folder = present(folder)
    rank, world_size = loss.collectives.rank, loss.collectives.world_size
    index = agree(_matching_index, loss, folder, data)
    agree(_check_files, folder, index, index["files"][rank::world_size])
    agree(_read_rows, loss.table, folder, index)
    loss.load_tau_state(index["tau"])
    loss.step = index["step"]
    loss.recount()
    return index


def check_same_shards(folder: Path, stored_hash: str, data: DataIdentity) -> None:
    """Raise UserError that names the first other shard, if a folder's shards are known and are not those of `data`.

    stored_hash: the hash that the folder's index says. Nothing is known of ids that are no positions in shards, and of
    a damaged shards.json.
    """
    if data.text is None:
        return
    try:
        stored = (folder / SHARDS).read_bytes()
        known = hashlib.sha256(stored).hexdigest() == stored_hash
        difference = first_difference(stored.decode(), data.text) if known else None
    except (OSError, ValueError, TypeError):
        return
    if difference is not None:
        raise UserError(
            f"{folder} was made with other training data: {difference}: go on with the same shards in the same order, "
            "or take the weights alone with --fastclip-fresh-state"
        )


def _matching_index(loss: FastCLIPLoss, folder: Path, data: DataIdentity) -> Index:
    """The index, if this loss can go on from it."""
    index = read_index(folder)
    weights_alone = "take the weights alone with --fastclip-fresh-state"
    table = loss.table
    if index["loss"] != loss.config.loss:
        raise UserError(
            f"{folder} is the state of {index['loss']!r} and this run is {loss.config.loss}: "
            f"go on with that loss, or {weights_alone}"
        )
    same_data = data == UNKNOWN or index["manifest_hash"] == data.hash
    if not same_data:
        check_same_shards(folder, index["manifest_hash"], data)
    if index["num_samples"] != table.num_samples:
        raise UserError(
            f"{folder} holds {index['num_samples']} samples and this run has {table.num_samples}: "
            f"go on with the same data (and --data-size), or {weights_alone}"
        )
    if not same_data:
        raise UserError(
            f"{folder} was made with other training data ({index['manifest_hash']!r}, this run has {data.hash!r}): "
            f"go on with the same shards in the same order and the same --sample-id, or {weights_alone}"
        )
    layout = (tuple(index["columns"]), index["dtype"], set(index["tau"]))
    if layout != (table.columns, _dtype_name(table), set(loss.tau_state())):
        raise UserError(
            f"{folder / INDEX} has other columns, another dtype or another tau than its loss has: {STATE.cure}"
        )
    return index


def _check_files(folder: Path, index: Index, entries: list[Entry]) -> None:
    """Raise UserError for a file that is not what the index says: bytes, checksum, names, shapes, dtypes."""
    for entry in entries:
        path = folder / entry["name"]
        check_entry(path, entry, STATE.cure)
        with reading_tensors(path, STATE.cure) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        column = (DTYPES[index["dtype"]], [entry["stop"] - entry["start"]])
        if found != dict.fromkeys(index["columns"], column):
            raise UserError(f"{path} holds other columns than its index says: {STATE.cure}")


def _read_rows(table: SampleTable, folder: Path, index: Index) -> None:
    """Fill this rank's part of the table from the files that overlap it."""
    for entry in index["files"]:
        start, stop = max(entry["start"], table.start), min(entry["stop"], table.stop)
        if start >= stop:
            continue
        with reading_tensors(folder / entry["name"], STATE.cure) as file:
            for name in table.columns:
                rows = file.get_slice(name)[start - entry["start"] : stop - entry["start"]]
                table.local(name)[start - table.start : stop - table.start].copy_(rows)


def _dtype_name(table: SampleTable) -> str:
    return str(table.rows.dtype).removeprefix("torch.")

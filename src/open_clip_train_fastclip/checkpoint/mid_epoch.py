"""A run saved between two steps of an epoch, as a folder: what lies in it, written and read by any number of ranks.

checkpoints/epoch_{e}_step_{i}/, with e epochs and i steps of the next one done:
  checkpoint.pt     what OpenCLIP saves at an epoch's end
  state.fastclip/   FastCLIP's state (its losses only)
  rank-00000-of-00002.safetensors ...   of each rank: its position in the data, and its random generators
  index.json        how far the run was, in which layout, and a checksum of every file
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.identity import DataIdentity
from . import index as indexes
from .atomic import (
    Entry,
    atomic_torch_save,
    check_entry,
    commit,
    entry_of,
    reading_tensors,
    unfinished,
    write_tensors,
    writing,
)
from .index import CHECKPOINT, MID_EPOCH, Index, rank_file
from .table import StateCopy, finish_state, write_rows, write_shards

STATE_FOLDER = "state.fastclip"
GROUPS = ("data", "generator")  # of a rank's tensors: its position in the data, the states of its generators


@dataclass(frozen=True)
class Layout:
    """What decides which rank and worker reads which samples when."""

    num_batches: int  # of an epoch, of each rank
    accum_freq: int
    world_size: int
    workers: int
    batch_size: int  # of a rank


@dataclass(frozen=True)
class Header:
    """What the index says of a run: the same on every rank."""

    epoch: int  # epochs done
    step: int  # steps of the next one done
    batches: int  # of the next one done, of each rank
    layout: Layout
    seed: int
    loss: str
    data: DataIdentity

    def content(self) -> Index:
        """The fields of the index, without the files."""
        own = {name: getattr(self, name) for name in ("epoch", "step", "batches", "seed", "loss")}
        return {**own, **asdict(self.layout), "data_hash": self.data.hash}


@dataclass
class RankPart:
    """What one rank adds to the folder, on the CPU."""

    rank: int
    tensors: dict[str, dict[str, Tensor]]  # of its own file, by GROUPS
    state: StateCopy | None
    checkpoint: dict[str, Any] | None  # of rank 0


PartEntries = dict[str, Any]  # of one rank: "files" of the index, and "state", the entry of its rows in the state's


def mid_epoch_dir(checkpoints: str | Path, epoch: int, step: int) -> Path:
    """Where a run with `epoch` epochs and `step` steps of the next one done is saved."""
    return Path(checkpoints) / f"epoch_{epoch}_step_{step}"


# -------------------------------------------------------------------- writing


def write_part(part: RankPart, folder: Path, world_size: int) -> PartEntries:
    """Write a rank's part of `folder`, unfinished yet, synced; returns its entries in the indexes."""
    partial = unfinished(folder)
    tensors = {f"{group}.{name}": tensor for group in GROUPS for name, tensor in part.tensors[group].items()}
    files = [write_tensors(tensors, partial / rank_file(part.rank, world_size))]
    state = write_rows(part.state, partial / STATE_FOLDER) if part.state else None
    if part.checkpoint is not None:
        path = partial / CHECKPOINT
        atomic_torch_save(part.checkpoint, path)
        with writing(path):
            files.insert(0, entry_of(path))
    return {"files": files, "state": state}


def complete(folder: Path, header: Header, state: StateCopy | None, entries: list[PartEntries]) -> None:
    """Rank 0, when all parts are written: give `folder` its indexes and its name.

    entries: what write_part() returned, in rank order.
    """
    partial = unfinished(folder)
    with writing(folder):
        if state is not None:
            finish_state(partial / STATE_FOLDER, state, [entry["state"] for entry in entries])
        else:
            write_shards(partial, header.data)
        files: list[Entry] = [file for entry in entries for file in entry["files"]]
        indexes.write(partial, indexes.sealed(MID_EPOCH, {**header.content(), "files": files}))
        commit(partial, folder)


# -------------------------------------------------------------------- reading


def read_index(folder: Path) -> Index:
    """The checked contents of the folder's index.json. Raises UserError if it is missing, damaged or another's."""
    return indexes.read(MID_EPOCH, folder)


def check_files(folder: Path, entries: list[Entry]) -> None:
    """Raise UserError for a file that is missing or damaged."""
    for entry in entries:
        check_entry(folder / entry["name"], entry, MID_EPOCH.cure)


class RankTensors(Mapping[str, Tensor]):
    """The tensors of one of GROUPS in a rank's file, read one by one: those of all ranks may not fit into memory."""

    def __init__(self, path: Path, group: str):
        self.path, self.prefix = path, f"{group}."

    def __getitem__(self, name: str) -> Tensor:
        with reading_tensors(self.path, MID_EPOCH.cure) as file:
            if self.prefix + name not in file.keys():
                raise KeyError(f"{self.path} holds no {self.prefix}{name}")
            tensor: Tensor = file.get_tensor(self.prefix + name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        with reading_tensors(self.path, MID_EPOCH.cure) as file:
            return iter([name.removeprefix(self.prefix) for name in file.keys() if name.startswith(self.prefix)])

    def __len__(self) -> int:
        return len(list(iter(self)))


def read_tensors(folder: Path, index: Index) -> list[dict[str, RankTensors]]:
    """What every rank wrote as RankPart.tensors, in rank order."""
    paths = [folder / rank_file(rank, index["world_size"]) for rank in range(index["world_size"])]
    return [{group: RankTensors(path, group) for group in GROUPS} for path in paths]

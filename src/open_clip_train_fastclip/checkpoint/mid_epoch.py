"""A run saved between two steps of an epoch, as a folder: what lies in it, written and read by any number of ranks.

checkpoints/epoch_{e}_step_{i}/, with e epochs and i steps of the next one done:
  checkpoint.pt     what OpenCLIP saves at an epoch's end
  state.fastclip/   FastCLIP's state (its losses only)
  rank-00000-of-00002.safetensors ...   of each rank: its position in the data, and its random generators
  index.json        how far the run was, in which layout, and a checksum of every file
"""

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data import identity as data_identity
from ..errors import UserError
from .atomic import atomic_torch_save, one_line, writing
from .folders import check_entry, entry_of, in_the_making, publish, write_index, write_tensors
from .index import INDEX, REPLACED, UNFINISHED, check_header, content_checksum, rank_file, read_checked, require
from .index import sealed as sealed_state
from .table import StateCopy, finish_state, write_rows

CHECKPOINT, STATE = "checkpoint.pt", "state.fastclip"
FORMAT, VERSION = "fastclip-snapshot", 1
NUMBERS = {  # fields of the index and the least that they can be
    "epoch": 0,  # epochs done
    "step": 0,  # steps of the next one done
    "batches": 0,  # of the next one done, of each rank
    "num_batches": 1,  # of an epoch
    "accum_freq": 1,
    "world_size": 1,
    "workers": 0,
    "batch_size": 1,  # of a rank
}
LAYOUT = ("num_batches", "accum_freq", "world_size", "workers", "batch_size")
GROUPS = ("data", "generator")  # of a rank's tensors: its position in the data, the states of its generators
DAMAGED = math.inf  # share of the epoch of a snapshot whose index cannot be read
CURE = "restore it from a copy, or resume from another checkpoint"


@dataclass
class Part:
    """What one rank adds to a snapshot, on the CPU."""

    rank: int
    world_size: int
    tensors: dict[str, dict[str, Tensor]]  # of its own file, by GROUPS
    state: StateCopy | None
    checkpoint: dict | None  # of rank 0


# -------------------------------------------------------------------- writing


def write_part(part: Part, folder: Path) -> dict:
    """Write a rank's part of `folder`, in the making and synced; returns its entries in the indexes."""
    partial = in_the_making(folder)
    tensors = {f"{group}.{name}": tensor for group in GROUPS for name, tensor in part.tensors[group].items()}
    files = [write_tensors(tensors, partial / rank_file(part.rank, part.world_size))]
    state = write_rows(part.state, partial / STATE) if part.state else None
    if part.checkpoint is not None:
        path = partial / CHECKPOINT
        atomic_torch_save(part.checkpoint, path)
        with writing(path):
            files.insert(0, entry_of(path))
    return {"files": files, "state": state}


def complete(folder: Path, facts: dict, state: StateCopy | None, entries: list[dict], data_text: str | None) -> None:
    """Rank 0, when all parts are written: give `folder` its indexes and its name.

    facts: NUMBERS, seed, loss and data_hash. entries: what write_part() returned on each rank.
    """
    partial = in_the_making(folder)
    with writing(folder):
        if state is not None:
            files = [entry["state"] for entry in entries]
            finish_state(partial / STATE, sealed_state({**state.content, "files": files}), data_text)
        elif data_text is not None:
            data_identity.write(partial, data_text)
        content = {"format": FORMAT, "version": VERSION, **facts, "files": sum((e["files"] for e in entries), [])}
        index = {**content, "crc32": content_checksum(content)}
        check_index(index)
        write_index(partial, index)
        publish(partial, folder)


# -------------------------------------------------------------------- reading


def read_index(folder: Path) -> dict:
    """The checked contents of a snapshot's index.json. Raises UserError if it is missing, damaged or another's."""
    return read_checked(folder / INDEX, check_index, "checkpoint in this folder", CURE)


def check_index(index) -> None:
    """Raise ValueError that says what is wrong with the contents of an index."""
    check_header(index, FORMAT, VERSION, "run")
    for name, least in NUMBERS.items():
        require(type(index.get(name)) is int and least <= index[name] < 2**63, f"{name} is no number in range")
    require(type(index.get("seed")) is int, "seed is no number")
    require(all(type(index.get(name)) is str for name in ("loss", "data_hash")), "loss or data_hash is no text")
    require(index["batches"] <= index["num_batches"], "more batches are done than there are")
    files = index.get("files")
    require(type(files) is list and len(files) == index["world_size"] + 1, "files is no list of them")
    names = [CHECKPOINT, *(rank_file(rank, index["world_size"]) for rank in range(index["world_size"]))]
    for name, entry in zip(names, files, strict=True):
        sound = isinstance(entry, dict) and all(type(entry.get(number)) is int for number in ("bytes", "crc32"))
        require(sound and entry.get("name") == name, f"{name} has no entry")  # so no path leads out of the folder


def check_files(folder: Path, entries: list[dict]) -> None:
    """Raise UserError for a file that is missing or damaged."""
    for entry in entries:
        check_entry(folder / entry["name"], entry, CURE)


class RankTensors(Mapping):
    """The tensors of one of GROUPS in a rank's file, read one by one: those of all ranks may not fit into memory."""

    def __init__(self, path: Path, group: str):
        self.path, self.prefix = path, f"{group}."

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as file:
            if self.prefix + name not in file.keys():
                raise KeyError(f"{self.path} holds no {self.prefix}{name}")
            return file.get_tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            return iter([name.removeprefix(self.prefix) for name in file.keys() if name.startswith(self.prefix)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    @contextmanager
    def _open(self):
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path} cannot be read ({one_line(error)}): {CURE}") from error


def read_tensors(folder: Path, index: dict) -> list[dict[str, RankTensors]]:
    """What every rank wrote as Part.tensors, in rank order."""
    paths = [folder / rank_file(rank, index["world_size"]) for rank in range(index["world_size"])]
    return [{group: RankTensors(path, group) for group in GROUPS} for path in paths]


# -------------------------------------------------------------------- all of a run


def layout(num_batches: int, args) -> dict[str, int]:
    """What decides which rank and worker reads which samples when, as the index says it; num_batches: of an epoch."""
    return {"num_batches": num_batches, **{name: getattr(args, name) for name in LAYOUT if name != "num_batches"}}


def snapshot_dir(checkpoints: str | Path, epoch: int, step: int) -> Path:
    """Where a run with `epoch` epochs and `step` steps of the next one done is saved."""
    return Path(checkpoints) / f"epoch_{epoch}_step_{step}"


def snapshots(checkpoints: str | Path) -> list[tuple[int, float, Path]]:
    """(epochs done, share of the next one, folder) of the complete snapshots, the newest last.

    One whose index is damaged has share DAMAGED and is the last of its epoch, so that it is noticed.
    """
    found = []
    for folder in Path(checkpoints).glob("epoch_*_step_*"):
        match = re.fullmatch(r"epoch_(\d+)_step_\d+(\.old)?", folder.name)
        if not match or (match[2] and folder.with_name(folder.name.removesuffix(REPLACED)).exists()):
            continue
        try:
            index = read_index(folder)
            found.append((index["epoch"], index["batches"] / index["num_batches"], folder))
        except UserError:
            found.append((int(match[1]), DAMAGED, folder))
    return sorted(found)


def leftovers(checkpoints: str | Path) -> list[Path]:
    """Snapshots that are not complete, since the run was killed while it wrote or removed them."""
    return sorted(Path(checkpoints).glob("epoch_*_step_*" + UNFINISHED))


def retire(written: Path, keep: int) -> list[Path]:
    """Take away the names of all but the newest `keep` snapshots, `written` among them; what can be removed now.

    A damaged one neither counts nor goes. For one rank, while nothing is being saved.
    """
    for replaced in written.parent.glob("epoch_*_step_*" + REPLACED):  # left by a kill while it was removed
        if replaced.with_name(replaced.name.removesuffix(REPLACED)).exists():
            shutil.rmtree(replaced, ignore_errors=True)
    others = [folder for _, share, folder in snapshots(written.parent) if folder != written and share != DAMAGED]
    for folder in others[: max(len(others) - keep + 1, 0)]:
        doomed = in_the_making(folder)  # half of it shall not be taken for a damaged one
        with writing(doomed):
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
    return leftovers(written.parent)

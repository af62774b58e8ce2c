"""index.json of a state and of a mid-epoch checkpoint: what it says, and that it says it rightly.

Nothing in it is trusted before: an index is JSON with a checksum of itself, of the fields of its schema, and its files
can only have the names that the schema gives them.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .atomic import sync

INDEX = "index.json"
CHECKPOINT = "checkpoint.pt"  # of a mid-epoch checkpoint
DTYPES = {"float32": "F32", "float64": "F64"}  # of the table -> safetensors' name
Index = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """What the value of a field must be."""

    is_right: Callable[[Any], bool]
    what: str


def _of_type(kind: type, what: str) -> Field:
    return Field(lambda value: type(value) is kind, what)


def _number(least: int) -> Field:
    return Field(lambda value: type(value) is int and least <= value < 2**63, f"number of {least} or more")


TEXT, LIST, OBJECT = _of_type(str, "text"), _of_type(list, "list"), _of_type(dict, "object")


@dataclass(frozen=True)
class Schema:
    """One kind of index: how it names itself and what it holds."""

    format: str
    version: int
    kind: str  # in messages
    cure: str  # what to do if it is damaged
    fields: dict[str, Field]
    file_names: Callable[[Index], list[str]]  # of an index with sound fields
    check_contents: Callable[[Index], None]  # ValueError for fields that do not go together


def rank_file(rank: int, world_size: int) -> str:
    """Name of the file of one rank."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def _rank_files(world_size: int) -> list[str]:
    return [rank_file(rank, world_size) for rank in range(world_size)]


def sealed(schema: Schema, content: Index) -> Index:
    """The contents of an index with format, version and a checksum of itself; ValueError if they are not sound."""
    content = {"format": schema.format, "version": schema.version, **content}
    index = {**content, "crc32": _checksum(content)}
    _check(schema, index)
    return index


def read(schema: Schema, folder: Path) -> Index:
    """The checked contents of a folder's index.json. Raises UserError if it is missing, damaged or not one of ours."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{path} is missing, so there is no complete {schema.kind}: {schema.cure}")
    try:
        index = json.loads(path.read_bytes())
        _check(schema, index)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): {schema.cure}") from error
    checked: Index = index
    return checked


def write(partial: Path, index: Index) -> None:
    """Write the index into the folder with all its files, synced. Raises UserError for a file that is not there."""
    for entry in index["files"]:
        path = partial / entry["name"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path} was written by another rank and rank 0 does not see it: save where all ranks see the same"
            )
    (partial / INDEX).write_text(json.dumps(index, indent=1))
    sync(partial / INDEX)
    sync(partial)


def _check(schema: Schema, index: Any) -> None:
    """Raise ValueError that says what is wrong with the contents of an index."""
    _require(isinstance(index, dict) and index.get("format") == schema.format, f"it is no index of a {schema.kind}")
    _require(index.get("version") == schema.version, "it was written by another version of open-clip-train-fastclip")
    content = {name: value for name, value in index.items() if name != "crc32"}
    _require(_checksum(content) == index.get("crc32"), "its checksum differs")
    for name, field in schema.fields.items():
        _require(field.is_right(index.get(name)), f"{name} is no {field.what}")
    names = schema.file_names(index)
    _require(len(index["files"]) == len(names), "it has another number of files than it should")
    for name, entry in zip(names, index["files"], strict=True):
        sound = isinstance(entry, dict) and all(type(entry.get(number)) is int for number in ("bytes", "crc32"))
        _require(sound and entry.get("name") == name, f"{name} has no entry")  # so no path leads out of the folder
    schema.check_contents(index)


def _checksum(content: Index) -> int:
    """CRC-32 of an index without its own checksum."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _require(ok: bool, what: str) -> None:
    """Raise ValueError(what) unless ok."""
    if not ok:
        raise ValueError(what)


# -------------------------------------------------------------------- the two schemas


def _check_state(index: Index) -> None:
    batch = index.get("global_batch_size")  # pairs a step, null if unknown
    _require(batch is None or (type(batch) is int and batch > 0), "global_batch_size is no number of pairs")
    _require(index["dtype"] in DTYPES, "dtype is unknown")
    _require(all(type(value) is float and math.isfinite(value) for value in index["tau"].values()), "tau is no number")
    plain = (str, int, float, bool, type(None))
    _require(all(isinstance(value, plain) for value in index["settings"].values()), "settings are no plain values")
    stop = 0
    for entry in index["files"]:
        ids = entry.get("start"), entry.get("stop")
        sound = all(type(number) is int for number in ids) and ids[0] == stop <= ids[1]
        _require(sound, f"{entry['name']} has another range than it should")
        stop = ids[1]
    _require(stop == index["num_samples"] > 0, "the files do not cover the samples")


STATE = Schema(
    format="fastclip-state",
    version=1,
    kind="FastCLIP state",
    cure="restore it from a copy, resume from another epoch, or take the weights alone with --fastclip-fresh-state",
    fields={
        "loss": TEXT,
        "epoch": _number(0),  # epochs done
        "step": _number(0),  # steps done
        "num_samples": _number(1),
        "manifest_hash": TEXT,  # data.identity: of the data that the ids belong to
        "columns": LIST,  # names, in the order of the table
        "dtype": TEXT,  # of the table
        "tau": OBJECT,  # the global temperature and its moments; empty with individual ones
        "settings": OBJECT,  # plain values that a resumed run uses again
        "files": LIST,  # one entry a rank, in rank order
    },
    file_names=lambda index: _rank_files(len(index["files"])),
    check_contents=_check_state,
)


def _check_mid_epoch(index: Index) -> None:
    _require(index["world_size"] == len(index["files"]) - 1, "it has not one file a rank")
    _require(index["batches"] <= index["num_batches"], "more batches are done than there are")


MID_EPOCH = Schema(
    format="fastclip-snapshot",  # the name that existing files have
    version=1,
    kind="checkpoint in this folder",
    cure="restore it from a copy, or resume from another checkpoint",
    fields={
        "epoch": _number(0),  # epochs done
        "step": _number(0),  # steps of the next one done
        "batches": _number(0),  # of the next one done, of each rank
        "num_batches": _number(1),  # of an epoch
        "accum_freq": _number(1),
        "world_size": _number(1),
        "workers": _number(0),
        "batch_size": _number(1),  # of a rank
        "seed": _of_type(int, "number"),
        "loss": TEXT,
        "data_hash": TEXT,  # data.identity
        "files": LIST,  # the checkpoint, then one entry a rank, in rank order
    },
    file_names=lambda index: [CHECKPOINT, *_rank_files(len(index["files"]) - 1)],
    check_contents=_check_mid_epoch,
)

"""index.json of a saved state: what it says, and that it says it rightly. Nothing in it is trusted before."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .atomic import one_line

INDEX = "index.json"
UNFINISHED, REPLACED = ".tmp", ".old"  # added to a folder's name while it is written, and while it is replaced
FORMAT, VERSION = "fastclip-state", 1
LARGEST_INDEX = 2**26  # bytes; a rank takes about 130
DTYPES = {"float32": "F32", "float64": "F64"}  # of the table -> safetensors' name
CURE = "restore it from a copy, resume from another epoch, or take the weights alone with --fastclip-fresh-state"
FIELDS = {
    "loss": str,
    "epoch": int,  # epochs done
    "step": int,  # steps done
    "num_samples": int,
    "manifest_hash": str,  # identity of the data that the ids belong to
    "columns": list,  # names, in the order of the table
    "dtype": str,  # of the table
    "tau": dict,  # the global temperature and its moments; empty with individual ones
    "settings": dict,  # plain values that a resumed run uses again
    "files": list,  # one entry a rank, in rank order
}
FILE_FIELDS = {"name": str, "start": int, "stop": int, "bytes": int, "crc32": int}


def rank_file(rank: int, world_size: int) -> str:
    """Name of the file with the rows of one rank."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def present(folder: str | Path) -> Path:
    """`folder`, or the state that a save was about to replace when it was killed between its two renames."""
    folder = Path(folder)
    replaced = folder.with_name(folder.name + REPLACED)
    return replaced if replaced.exists() and not folder.exists() else folder


def sealed(content: dict) -> dict:
    """The contents of an index with format, version and a checksum of itself; ValueError if they are not sound."""
    content = {"format": FORMAT, "version": VERSION, **content}
    index = {**content, "crc32": content_checksum(content)}
    check_index(index)
    return index


def read_index(folder: str | Path) -> dict:
    """The checked contents of a state's index.json. Raises UserError if it is missing, damaged or not one of ours."""
    return read_checked(present(folder) / INDEX, check_index, "state", CURE)


def read_checked(path: Path, check: Callable, kind: str, cure: str) -> dict:
    """JSON that passes check(), which raises ValueError; else UserError that ends with the cure."""
    if not path.is_file():
        raise UserError(f"{path} is missing, so there is no complete {kind}: {cure}")
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError("it is far too large")
        index = json.loads(path.read_bytes())
        check(index)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): {cure}") from error
    return index


def check_header(index, format: str, version: int, kind: str) -> None:
    """Raise ValueError if an index is not of that format and version, or not what its checksum is of."""
    require(isinstance(index, dict) and index.get("format") == format, f"it is no index of a {kind}")
    require(index.get("version") == version, "it was written by another version of open-clip-train-fastclip")
    content = {name: value for name, value in index.items() if name != "crc32"}
    require(content_checksum(content) == index.get("crc32"), "its checksum differs")


def check_index(index) -> None:
    """Raise ValueError that says what is wrong with the contents of an index."""
    check_header(index, FORMAT, VERSION, "FastCLIP state")
    for name, kind in FIELDS.items():
        require(type(index.get(name)) is kind, f"{name} is no {kind.__name__}")
    batch = index.get("global_batch_size")  # pairs a step, null if unknown
    require(batch is None or (type(batch) is int and batch > 0), "global_batch_size is no number of pairs")
    require(0 <= index["epoch"] < 2**63 and 0 <= index["step"] < 2**63, "epoch or step is out of range")
    require(index["dtype"] in DTYPES, "dtype is unknown")
    require(all(type(value) is float and math.isfinite(value) for value in index["tau"].values()), "tau is no number")
    plain = (str, int, float, bool, type(None))
    require(all(isinstance(value, plain) for value in index["settings"].values()), "settings are no plain values")
    _check_files(index["files"], index["num_samples"])


def _check_files(files: list, num_samples: int) -> None:
    stop = 0
    for rank, entry in enumerate(files):
        require(isinstance(entry, dict), f"file {rank} has no entry")
        for name, kind in FILE_FIELDS.items():
            require(type(entry.get(name)) is kind, f"{name} of file {rank} is no {kind.__name__}")
        # The names can only be ours, so no path in an index leads out of its folder.
        require(entry["name"] == rank_file(rank, len(files)), f"file {rank} has another name than it should")
        require(entry["start"] == stop <= entry["stop"], f"file {rank} has another range than it should")
        stop = entry["stop"]
    require(stop == num_samples > 0, "the files do not cover the samples")


def content_checksum(content: dict) -> int:
    """CRC-32 of an index without its own checksum."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def require(ok: bool, what: str) -> None:
    """Raise ValueError(what) unless ok."""
    if not ok:
        raise ValueError(what)

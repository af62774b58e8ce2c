"""Folders of several ranks' files and an index of them, which are complete or not there.

They are written under another name, synced to the disk, and renamed when the last file is in.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from .atomic import file_checksum, one_line, sync, writing
from .index import INDEX, REPLACED, UNFINISHED


def in_the_making(folder: Path) -> Path:
    """The name under which `folder` is written."""
    return folder.with_name(folder.name + UNFINISHED)


def remove_leftover(partial: Path, is_first: bool) -> None:
    """Take away what a killed save left behind."""
    if is_first and partial.exists():
        with writing(partial):
            shutil.rmtree(partial)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> dict:
    """Write CPU tensors to a safetensors file, synced; returns its name, bytes and checksum."""
    with writing(path):
        # On every rank: without a shared file system rank 0 then misses the file, and can say so.
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors ignores the umask, mkdir obeys it
        sync(path)
        return entry_of(path)


def entry_of(path: Path) -> dict:
    """What an index says of a file."""
    return {"name": path.name, "bytes": path.stat().st_size, "crc32": file_checksum(path)}


def check_entry(path: Path, entry: dict, cure: str) -> None:
    """Raise UserError, which ends with `cure`, if a file is missing or not what entry_of() said."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {cure}")
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"{path} has {size} bytes and should have {entry['bytes']}: {cure}")
        if file_checksum(path) != entry["crc32"]:
            raise UserError(f"{path} is damaged, since its checksum differs: {cure}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): {cure}") from error


def write_index(partial: Path, index: dict) -> None:
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


def publish(partial: Path, folder: Path) -> None:
    """Give a folder in the making its name, in the place of what had it."""
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)

"""Files and folders that survive a crash: whole under their name, or not there.

They are written under another name, synced to the disk, and then renamed. A folder holds files of several ranks and an
index of them; it is renamed when the last file is in.
"""

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, one_line
from ..ranks import is_first_rank

UNFINISHED, REPLACED = ".tmp", ".old"  # added to a name while it is written, and to a folder's while it is replaced
Entry = dict[str, Any]  # of an index: the name, bytes and crc32 of a file


def atomic_torch_save(obj: Any, path: str | Path) -> None:
    """torch.save in such a way that `path` holds either what it held before or all of `obj`, also after a crash.

    Raises UserError if it cannot be written. The file in the making does not end in .pt.
    """
    path = Path(path)
    partial = path.with_name(path.name + UNFINISHED)
    try:
        with writing(path):
            with open(partial, "wb") as file:
                torch.save(obj, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """fsync of a file, or of a folder's names; a file system that cannot sync a folder is left alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk says while `path` is written into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({one_line(error)}): see to the disk's space and permissions, then start again"
        ) from error


# -------------------------------------------------------------------- folders


def unfinished(folder: Path) -> Path:
    """The name under which `folder` is written."""
    return folder.with_name(folder.name + UNFINISHED)


def remove_leftover(partial: Path) -> None:
    """Take away what a killed save left behind; done by rank 0 alone."""
    if is_first_rank() and partial.exists():
        with writing(partial):
            shutil.rmtree(partial)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> Entry:
    """Write CPU tensors to a safetensors file, synced; returns its name, bytes and checksum."""
    with writing(path):
        # On every rank: without a shared file system rank 0 then misses the file, and can say so.
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors ignores the umask, mkdir obeys it
        sync(path)
        return entry_of(path)


def entry_of(path: Path) -> Entry:
    """What an index says of a file."""
    return {"name": path.name, "bytes": path.stat().st_size, "crc32": _checksum(path)}


@contextmanager
def reading_tensors(path: Path, cure: str) -> Iterator[Any]:
    """An open safetensors file; what the disk or the file does wrong becomes a UserError that ends with `cure`."""
    try:
        # safetensors takes no path that is no UTF-8, but any that leads to the file
        with open(path, "rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): {cure}") from error


def check_entry(path: Path, entry: Entry, cure: str) -> None:
    """Raise UserError, which ends with `cure`, if a file is missing or not what entry_of() said."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {cure}")
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"{path} has {size} bytes and should have {entry['bytes']}: {cure}")
        if _checksum(path) != entry["crc32"]:
            raise UserError(f"{path} is damaged, since its checksum differs: {cure}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): {cure}") from error


def commit(partial: Path, folder: Path) -> None:
    """Give a folder in the making its name, in the place of what had it."""
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def present(folder: str | Path) -> Path:
    """`folder`, or the one that a save was about to replace when it was killed between its two renames."""
    folder = Path(folder)
    replaced = folder.with_name(folder.name + REPLACED)
    return replaced if replaced.exists() and not folder.exists() else folder

"""Files that survive a crash: written under another name, synced to the disk, then renamed."""

import errno
import os
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..errors import UserError


def atomic_torch_save(obj, path: str | Path) -> None:
    """torch.save in such a way that `path` holds either what it held before or all of `obj`, also after a crash.

    Raises UserError if it cannot be written. The file in the making does not end in .pt.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
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


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


@contextmanager
def writing(path: Path):
    """Turn what the disk says while `path` is written into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({one_line(error)}): see to the disk's space and permissions, then start again"
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of an error; torch.save hides what the disk said in the context of its own error."""
    while not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _NumpyType:
    """Stands for numpy.dtype while a released file is read: the learning rates in it are numpy scalars."""

    def __init__(self, code: str, *flags):
        self.code = code

    def __setstate__(self, state: tuple):
        self.byte_order = state[1]


def _number(kind: _NumpyType, raw: bytes) -> float | int:
    """Stands for numpy's function that makes a scalar; the result is plain."""
    return struct.unpack(kind.byte_order + {"f8": "d", "f4": "f", "i8": "q", "i4": "i"}[kind.code], raw)[0]


def numpy_numbers_are_plain():
    """Context in which torch.load(weights_only=True) also takes numpy scalars, as numbers.

    Older training code left its learning rates in the optimizer's groups as numpy scalars.
    """
    return torch.serialization.safe_globals(
        [
            (_NumpyType, "numpy.dtype"),
            (_number, "numpy.core.multiarray.scalar"),
            (_number, "numpy._core.multiarray.scalar"),
        ]
    )

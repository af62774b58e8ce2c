"""The files in shards, for the loader and for counting: to a shard's very end, also where tars were joined by `cat`.

tarfile alone stops at the first end mark and at the first damaged header, without a word.
"""

import re
import subprocess
import tarfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import base_plus_ext

from .shard_list import local_path


class _Header(tarfile.TarInfo):
    """A tar header; one that is damaged is an error, and no end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and any(buf):
                raise tarfile.ReadError(f"damaged inside, {error}") from None
            raise  # zeros, or the end of the file


SECONDS_TO_END = 1  # for the command that fetches a shard, once its output is read
TAR_OPTIONS: Any = {"ignore_zeros": True, "tarinfo": _Header}  # for tarfile.open


class ReadUrl(str):
    """A shard's url, an object of its own each time that the shard is read."""

    samples = 0  # that were found in it
    failed = ""  # why its end could not be read


class Watcher(Protocol):
    """Is told how the reading of shards ends: tally.Tally."""

    def seconds_to_wait(self, url: str) -> float | None:
        """Before a shard that could not be fetched is fetched again; None: it was tried often enough."""

    def reading_failed(self, url: ReadUrl, error: Exception, files: int) -> None:
        """The rest of a shard, behind so many files, is left out."""

    def shard_through(self, url: ReadUrl) -> None:
        """All files of a shard that can be read were passed on, if any."""


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files that webdataset passes on: regular ones whose names do not begin with __metadata__.

    Raises tarfile.ReadError if the tar is damaged or lacks the two blocks of zeros at its end.
    """
    listed: Any = tar
    end = 0  # of the last file
    for member in tar:
        listed.members = []  # the list of what was read would take a kilobyte a file
        end = listed.offset
        if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
            yield member
    if listed.offset - end < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("cut off, a complete tar ends with zeros")


def shard_files(
    shards: Iterable[dict[str, Any]], needed: Collection[str], watcher: Watcher
) -> Iterator[dict[str, Any]]:
    """{"fname", "data", "__url__"} of each file in shards {"url": ...}, as webdataset's own stages give them.

    needed: endings of files; the data of all others are empty, and are not read into memory. __url__ is a ReadUrl. A
    shard that is fetched, and of which nothing came, is fetched once more.
    """
    for shard in shards:
        url, files = ReadUrl(shard["url"]), 0
        for is_last_try in (True,) if local_path(url) is not None else (False, True):
            try:
                for file in _files(url, needed):
                    files += 1
                    yield file
            except Exception as error:  # what a command, a decompressor and a disk raise is not one kind
                seconds = None if files or is_last_try else watcher.seconds_to_wait(url)
                if seconds is not None:
                    time.sleep(seconds)
                    continue
                watcher.reading_failed(url, error, files)
            break
        watcher.shard_through(url)


def _files(url: str, needed: Collection[str]) -> Iterator[dict[str, Any]]:
    with _opened(url) as stream:
        tar = tarfile.open(fileobj=stream, mode="r|*", **TAR_OPTIONS)
        for member in members(tar):
            _, ending = base_plus_ext(member.name)
            content: Any = tar.extractfile(member) if ending is not None and ending.lower() in needed else None
            yield {"fname": member.name, "data": content.read() if content else b"", "__url__": url}


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A shard's stream. Raises OSError with the command's exit code if that is why it cannot be read."""
    stream: Any = gopen(url)
    if not isinstance(stream, Pipe):
        with stream:
            yield stream
        return
    try:
        yield stream
    except Exception:
        if _has_ended(stream):
            stream.wait_for_child()  # which raises for its exit code
        raise
    finally:
        stream.stream.close()  # a command that still writes ends by it; its own close() waits for hours
        _has_ended(stream)


def _has_ended(pipe: Pipe) -> bool:
    try:
        pipe.proc.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        return False
    return True

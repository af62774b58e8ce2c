"""The files in shards, for the loader and for counting: to a shard's very end, also where tars were joined by `cat`.

tarfile alone stops at the first end mark and at the first damaged header, without a word.
"""

import re
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

from webdataset.gopen import gopen

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


TAR_OPTIONS: Any = {"ignore_zeros": True, "tarinfo": _Header}  # for tarfile.open


class ReadUrl(str):
    """A shard's url, an object of its own each time that the shard is read."""

    samples = 0  # that were found in it


class Watcher(Protocol):
    """Is told how the reading of shards ends: tally.Tally."""

    @property
    def seconds_to_wait(self) -> float:
        """Before a shard is fetched again."""

    def reading_failed(self, url: str, error: Exception, files: int) -> None:
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


def shard_files(shards: Iterable[dict[str, Any]], watcher: Watcher) -> Iterator[dict[str, Any]]:
    """{"fname", "data", "__url__"} of each file in shards {"url": ...}, as webdataset's own stages give them.

    __url__ is a ReadUrl. A shard that is fetched, and of which nothing came, is fetched once more.
    """
    for shard in shards:
        url, files = ReadUrl(shard["url"]), 0
        for is_last_try in (True,) if local_path(url) is not None else (False, True):
            try:
                for file in _files(url):
                    files += 1
                    yield file
            except Exception as error:  # what a command, a decompressor and a disk raise is not one kind
                if not files and not is_last_try:
                    time.sleep(watcher.seconds_to_wait)
                    continue
                watcher.reading_failed(url, error, files)
            break
        watcher.shard_through(url)


def _files(url: str) -> Iterator[dict[str, Any]]:
    stream: Any = gopen(url)
    # a command is left to end by itself: closing would wait for it
    with nullcontext() if local_path(url) is None else stream:
        tar = tarfile.open(fileobj=stream, mode="r|*", **TAR_OPTIONS)
        for member in members(tar):
            content: Any = tar.extractfile(member)
            yield {"fname": member.name, "data": content.read(), "__url__": url}

"""Counting the samples of shards by their tar headers, and the counts of that, kept in a small JSON file a folder."""

import hashlib
import json
import logging
import os
import secrets
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..errors import named_line
from .shard_list import THREADS, Problem
from .tar_files import TAR_OPTIONS, members

FILE_NAME = "fastclip_sizes.json"
MOST_SAMPLES = 2**40  # of a shard; more is a mistake in its sizes.json
SECONDS_BETWEEN_LINES = 10  # of progress, where there is no terminal for a bar
# The loader's function that makes samples of a tar's files, given as {"fname": ..., "data": ...}.
Group = Callable[[Iterator[dict[str, Any]]], Iterable[Any]]


class Scanned(NamedTuple):
    """A shard's samples, counted, and its size and time of change, which tell whether it is still that shard."""

    samples: int
    bytes: int
    mtime_ns: int


def scan_shard(path: str, group: Group) -> Scanned | Problem:
    """Count a shard's samples by its tar headers, without reading its files; a problem if there is no end to them."""
    stat = os.stat(path)
    try:
        with tarfile.open(path, **TAR_OPTIONS) as tar:
            files = ({"fname": member.name, "data": b"not read", "__url__": tar.name} for member in members(tar))
            count = sum(1 for _ in group(files))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        return Problem(
            f"shard {path} cannot be read to its end ({named_line(error)})", "make it again, or leave it out"
        )
    return Scanned(count, stat.st_size, stat.st_mtime_ns)


def scan_shards(paths: list[str], group: Group, progress: bool) -> list[Scanned | Problem]:
    """scan_shard() of each of `paths`, several at a time; progress: show it on stderr."""
    with ThreadPoolExecutor(THREADS) as pool:
        scans = pool.map(lambda path: scan_shard(path, group), paths)
        return list(_shown(scans, len(paths)) if progress else scans)


def _shown(scans: Iterable[Scanned | Problem], total: int) -> Iterator[Scanned | Problem]:
    """A bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(scans, "counting samples", total, unit=" shards")
        return
    last = time.monotonic()
    for done, scanned in enumerate(scans, 1):
        if done == total or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"counting samples: {done:,} of {total:,} shards", file=sys.stderr, flush=True)
        yield scanned


class ScanCache:
    """Reads and writes the counts, folder by folder; what is stale or damaged is as good as absent.

    cache_dir: holds the counts of the folders in which nothing can be written.
    """

    def __init__(self, cache_dir: str | Path | None = None):
        self.cache_dir = cache_dir
        self._entries = cache(lambda folder: [_read(file) for file in self._files(folder)])

    def count(self, path: str) -> int | None:
        """The cached number of samples of a shard that has not changed since it was counted."""
        folder, name = os.path.split(path)
        for entries in self._entries(folder):
            if name in entries:
                scanned, stat = Scanned(*entries[name]), os.stat(path)
                if (scanned.bytes, scanned.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                    return scanned.samples
        return None

    def write(self, scans: dict[str, Scanned]) -> None:
        """Add the counts of {path: scanned}; a warning where they can be kept nowhere."""
        folders: dict[str, dict[str, Scanned]] = {}
        for path, scanned in scans.items():
            folder, name = os.path.split(path)
            folders.setdefault(folder, {})[name] = scanned
        for folder, entries in folders.items():
            if not any(_add(file, entries) for file in self._files(folder)):
                logging.warning(
                    f"the sizes of the shards in {folder or os.curdir} cannot be kept: the next run counts them again"
                )

    def _files(self, folder: str) -> list[Path]:
        """Where a folder's counts may lie: beside the shards, then in cache_dir."""
        files = [Path(folder, FILE_NAME)]
        if self.cache_dir:
            mark = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:12]
            files.append(Path(self.cache_dir, f"{Path(FILE_NAME).stem}_{mark}.json"))
        return files


def _read(file: Path) -> dict[str, list[int]]:
    try:
        entries = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
    return {name: entry for name, entry in entries.items() if _is_sound(entry)}


def _is_sound(entry: Any) -> bool:
    are_numbers = isinstance(entry, list) and all(type(number) is int for number in entry)
    return are_numbers and len(entry) == len(Scanned._fields) and 0 <= entry[0] <= MOST_SAMPLES


def _add(file: Path, entries: dict[str, Scanned]) -> bool:
    """Merge entries into a file, which at every moment is the old one or the new one; whether it could be written."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_read(file) | entries))
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        return False
    return True

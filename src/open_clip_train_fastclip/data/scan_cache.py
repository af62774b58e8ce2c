"""The counts of a scan, kept beside the shards: a small JSON file in each folder."""

import hashlib
import json
import logging
import os
import secrets
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE_NAME = "fastclip_sizes.json"
MOST_SAMPLES = 2**40  # of a shard; more is a slip of the pen


class Scanned(NamedTuple):
    """A shard's number of samples, and its size and time of change, which tell whether it is still that shard."""

    count: int
    bytes: int
    mtime_ns: int


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
                    return scanned.count
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
            mark = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:12]
            files.append(Path(self.cache_dir, f"{Path(FILE_NAME).stem}_{mark}.json"))
        return files


def _read(file: Path) -> dict[str, list[int]]:
    try:
        entries = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return {name: entry for name, entry in entries.items() if _is_sound(entry)}


def _is_sound(entry) -> bool:
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

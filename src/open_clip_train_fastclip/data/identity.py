"""The shards that a state was made with, kept in it, so that a resume on other data can say where they differ."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from ..checkpoint.atomic import sync

SHARDS = "shards.json"  # in a state's folder; the index's manifest_hash is its SHA-256
LARGEST = 2**28  # bytes; a shard takes about 20


def write(folder: Path, text: str) -> None:
    """Put ShardManifest.text into a state's folder, synced."""
    (folder / SHARDS).write_text(text)
    sync(folder / SHARDS)


def difference(folder: Path, stored_hash: str, text: str | None) -> str | None:
    """How the shards of a run (ShardManifest.text, None if it has none) differ from those of the state in `folder`.

    stored_hash: manifest_hash of the state's index. None if the state does not tell: it is older, its ids are no
    positions in shards, or the file is damaged.
    """
    stored = None if text is None else _read(folder / SHARDS, stored_hash)
    return None if stored is None else _first_difference(stored, json.loads(text))


def _read(path: Path, stored_hash: str) -> list[list] | None:
    try:
        if path.stat().st_size > LARGEST:
            return None
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != stored_hash:
            return None
        shards = [[name, count] for name, count in json.loads(content)]
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    # Whoever writes the file can write its hash: what goes into a message is looked at.
    sound = all(type(n) is str and n.isprintable() and type(c) is int and 0 <= c < 2**63 for n, c in shards)
    return shards if sound else None


def _first_difference(before: list[list], now: list[list]) -> str | None:
    """Of two lists of [name of a shard, its samples]; a name may occur twice, from two folders."""
    names_before, names_now = (Counter(name for name, _ in shards) for shards in (before, now))
    for place in range(max(len(before), len(now))):
        old, old_count = before[place] if place < len(before) else (None, 0)
        new, new_count = now[place] if place < len(now) else (None, 0)
        where = f"the first difference is shard {place + 1:,}"
        if old == new and old_count != new_count:
            return f"{where}, {old}, which had {old_count:,} samples and has {new_count:,} now"
        if old == new:
            continue
        if old is not None and names_now[old] < names_before[old]:
            return f"{where}, {old}, which is missing now"
        if new is not None and names_before[new] < names_now[new]:
            return f"{where}, {new}, which is new"
        return f"{where}, which was {old} and is {new} now: the order is another"
    return None

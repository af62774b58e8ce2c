"""Which data the ids of samples belong to, so that a run goes on with the same data alone."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class DataIdentity:
    """Names the data of a run. Its hash is the same wherever the data lie, and another for other data.

    text: of ids that are positions in shards, what the hash (SHA-256) is of: the names and sizes of the shards in
    order, as JSON, without folders. It tells where two data sets differ.
    """

    hash: str
    text: str | None = None

    @classmethod
    def of_shards(cls, sizes: Iterable[tuple[str, int]]) -> "DataIdentity":
        """Ids are positions in shards of these (name, samples)."""
        text = json.dumps([[name, count] for name, count in sizes])
        return cls(hashlib.sha256(text.encode()).hexdigest(), text)

    @classmethod
    def of_json_keys(cls, num_samples: int) -> "DataIdentity":
        """Ids are the json keys of the samples, below num_samples."""
        return cls(f"json-key:{num_samples}")

    @classmethod
    def of_table(cls, rows: Iterable[tuple[str, str]]) -> "DataIdentity":
        """Ids are the numbers of rows of (image's file name, caption)."""
        digest = hashlib.sha256()
        for image, caption in rows:
            digest.update(json.dumps([image, caption]).encode())
        return cls(digest.hexdigest())

    @classmethod
    def of_synthetic_rows(cls, num_samples: int) -> "DataIdentity":
        """Ids are the numbers of rows that have no content of their own."""
        return cls(f"rows:{num_samples}")


def first_difference(before: str, now: str) -> str | None:
    """Where the shards of two DataIdentity.text differ first, in words; None if they do not.

    Raises ValueError or TypeError for a text that is none.
    """
    shards_before, shards_now = ([(name, count) for name, count in json.loads(text)] for text in (before, now))
    # a name may occur twice, from two folders
    names_before, names_now = (Counter(name for name, _ in shards) for shards in (shards_before, shards_now))
    for place in range(max(len(shards_before), len(shards_now))):
        old, old_count = shards_before[place] if place < len(shards_before) else (None, 0)
        new, new_count = shards_now[place] if place < len(shards_now) else (None, 0)
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

"""The finished runs of the tables: one line each in results/runs.jsonl, found by their settings."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..harness.records import RESULTS

DONE, FAILED = "done", "failed"


def key_of(settings: dict) -> str:
    """12 hexadecimal digits that stand for the settings of a run, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Store:
    """Rows by key; of several rows with one key the newest counts. Rows are appended and never replaced."""

    def __init__(self, folder: Path = RESULTS):
        self.path = folder / "runs.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows = {row["key"]: row for row in map(json.loads, lines)}

    def get(self, key: str) -> dict | None:
        """The newest row of these settings, done or failed."""
        return self.rows.get(key)

    def is_done(self, key: str) -> bool:
        """Whether a run of these settings came to its end."""
        return key in self.rows and self.rows[key]["status"] == DONE

    def missing(self, runs: dict[str, Any]) -> list:
        """Of `runs` by key those that have not come to their end; prints how many there are."""
        missing = [run for key, run in runs.items() if not self.is_done(key)]
        print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before", flush=True)
        return missing

    def add(self, row: dict) -> None:
        """Append a row, which has at least key and status."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["key"]] = row

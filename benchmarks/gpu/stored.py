"""Rows of earlier checks, and what is different now."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAME = "gpu.jsonl"
NOTABLE = 0.1  # of a figure that changed
WATCHED = (
    "step_ms", "samples_per_second", "idle_ms", "queued_ms", "gpu_ms", "kernels", "peak_extra_bytes", "teraflops",
    "until_saved_and_ended_s",
)  # fmt: skip


def read(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """All rows of the folders' gpu.jsonl, oldest first within a file."""
    files = [folder / NAME for folder in folders]
    return [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]


def card_of(row: dict[str, Any]) -> str:
    """What a row was measured on: its GPU, or the CPU where it ran on that."""
    machine = row["machine"]
    return str(machine["gpu"] if row["device"] == "cuda" else machine["cpu"])


def measurement(row: dict[str, Any]) -> str:
    """The same text for rows that measure the same thing."""
    return json.dumps([row["part"], row["name"], row["case"]], sort_keys=True)


def changes(row: dict[str, Any], earlier: list[dict[str, Any]]) -> Iterator[str]:
    """Lines on what differs from the last stored row of the same measurement on the same card.

    A curve is compared with the last one of every card, CPUs among them.
    """
    same = [other for other in earlier if measurement(other) == measurement(row)]
    last = {card_of(other): other for other in same}
    before = last.get(card_of(row))
    if before is not None:
        if {before["ok"], row["ok"]} == {True, False}:
            yield f"ok was {before['ok']} and is {row['ok']}"
        yield from _changed_figures(before["figures"], row["figures"])
    for card, other in last.items():
        if "curve" in row["figures"] and "curve" in other["figures"]:
            pairs = zip(row["figures"]["curve"], other["figures"]["curve"], strict=True)
            yield f"off the curve of {card} by at most {max(abs(a - b) for a, b in pairs):.2g}"


def _changed_figures(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in WATCHED:
        old, new = before.get(name), now.get(name)
        if old and new is not None and abs(new / old - 1) > NOTABLE:
            yield f"{name} was {old:g} and is {new:g} ({100 * (new / old - 1):+.0f}%)"

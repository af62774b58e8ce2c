"""What a table of the benchmarks is made of: rows, each a setting that is trained, and what is compared in them."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..glyph_data.dataset import Settings
from .real_pairs import RealPairs

LOCAL = ("tiny", "real")  # on this machine: drawn characters, and real image-text pairs
LARGER = ("medium", "large", "xlarge")  # with the recipes of scripts/slurm
SCALES = (*LOCAL, *LARGER)
GLYPHS_AND_LARGER = ("tiny", *LARGER)
# 4,500 training pairs, 30% of them with a wrong caption. Of the 3,000 held-out pairs in 6 shards the first 2,000 are
# reported and the last 1,000 are for tuning.
NOISY = Settings(val_per_character=20, val_shards=6)


@dataclass(frozen=True)
class Kept:
    """Folders of data and runs for a user to look at; a run's has the name of its row."""

    data: Path
    runs: Path


@dataclass(frozen=True)
class Row:
    """One setting that is trained with several seeds. Rows of two tables with the same settings share their runs.

    Flags are a dict from the flag to its value, None for a switch.
    """

    name: str  # of its runs' folders
    label: str  # in the report
    loss: str
    flags: dict = field(default_factory=dict)  # at every scale
    local: dict = field(default_factory=dict)  # at the local scales alone
    larger: dict = field(default_factory=dict)  # at the larger scales, beyond the recipe's
    data: Settings | RealPairs = NOISY  # local: of scale tiny, or of scale real
    batch: int = 32  # local: pairs of the global batch
    ranks: int = 1  # local
    epochs: int = 12  # local
    curve: bool = False  # local: evaluate every second epoch too, or as --val-frequency of its flags says
    kept: Kept | None = None  # local; None: data and runs lie under their keys, and a run goes when it is stored
    seeds: int = 3  # local: at most so many
    nodes: int | None = None  # larger scales; None: those that the recipe was published on
    scales: tuple[str, ...] = GLYPHS_AND_LARGER


@dataclass(frozen=True)
class Comparison:
    """`better` is expected above `base`; both are names of rows."""

    base: str
    better: str


@dataclass(frozen=True)
class Table:
    """What one table shows.

    published: files of benchmarks/published, whose rows are found by the loss and the number of nodes;
    published_gaps: one of the gains in `comparisons`, found by the number of nodes.
    """

    title: str
    question: str
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...] = ()
    published: tuple[str, ...] = ()
    published_gaps: str | None = None
    kind: str = "scores"  # or "tuning" (scores of the tuning pairs) or "step_time"
    scales: tuple[str, ...] = GLYPHS_AND_LARGER
    notes: str = ""  # what we make of the outcome

    def rows_at(self, scale: str, quick: bool = False) -> list[Row]:
        """The rows that are run at a scale; `quick`: each with one seed and a third of the epochs, to try the table."""
        rows = [row for row in self.rows if scale in self.scales and scale in row.scales]
        return [replace(row, seeds=1, epochs=math.ceil(row.epochs / 3), kept=None) for row in rows] if quick else rows


def of_scale(names: dict[str, Any], scale: str) -> Any:
    """The entry for a scale of this machine, or the one that the larger ones share."""
    return names[scale if scale in LOCAL else "larger"]


def arguments_of(flags: dict) -> list[str]:
    """A dict of flags as words of a command line, where a later one wins over an earlier one."""
    return [word for flag, value in flags.items() for word in ([flag] if value is None else [flag, str(value)])]

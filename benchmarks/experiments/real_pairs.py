"""The data of a row at scale real: which of the image-text pairs of benchmarks.real_data it trains on."""

from dataclasses import dataclass
from pathlib import Path

from ..real_data import usual_folder


@dataclass(frozen=True)
class RealPairs:
    """The first `shards` training shards of a group of sets, with `pairs` pairs in all."""

    sets: str = "colour"  # or "all": those of one colour too
    size: int = 32  # of a picture's sides in px, or 64
    pairs: int = 10_086
    shards: int = 5

    @property
    def folder(self) -> Path:
        """Where the data lie: the same for every number of pairs."""
        return usual_folder(self.sets, self.size)


TENTH = RealPairs()
COLOUR = RealPairs(pairs=38_330, shards=19)
ALL = RealPairs("all", pairs=83_501, shards=42)
VAL_PAIRS, VAL_SHARDS = 2_000, 4

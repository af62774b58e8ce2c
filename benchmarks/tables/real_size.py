"""How does the gain depend on the number of real pairs?"""

from dataclasses import replace

from ..experiments.real_pairs import ALL, COLOUR
from ..experiments.table import Comparison, Table
from .real_batch import at
from .real_settings import CLIP, FROZEN, V1, V3


def on(row, data, batch):
    """`row` on more pairs."""
    name, label = f"{row.name}-pairs{data.pairs}-batch{batch}", f"{data.pairs:,} pairs, batch {batch}: {row.label}"
    return replace(at(row, batch), name=name, label=label, data=data, seeds=1)


PLACES = [(data, batch) for data in (COLOUR, ALL) for batch in (32, 128)]
TABLE = Table(
    "Size of the real data",
    "All 38,330 training pairs of the coloured sets, and 83,501 with those of one colour, which have other held-out "
    "pairs: compare their gains and not their scores.",
    tuple(on(row, *place) for place in PLACES for row in (CLIP, FROZEN, V1, V3)),
    tuple(
        Comparison(on(base, *place).name, on(better, *place).name)
        for place in PLACES
        for better in (V1, V3)
        for base in (CLIP, FROZEN)
    ),
    scales=("real",),
)

"""How does the gain depend on the number of real pairs?"""

from dataclasses import replace

from ..experiments.real_pairs import ALL, COLOUR
from ..experiments.table import Comparison, Table
from .real_batch import at
from .real_settings import CLIP, FROZEN, V1, V3, with_eps

EPS = (1e-3, 1e-4)


def on(row, data, batch):
    """`row` on more pairs."""
    name, label = f"{row.name}-pairs{data.pairs}-batch{batch}", f"{data.pairs:,} pairs, batch {batch}: {row.label}"
    return replace(at(row, batch), name=name, label=label, data=data, seeds=1)


PLACES = ((COLOUR, 32), (COLOUR, 128), (ALL, 128))
FASTCLIPS = [row for of in (V1, V3) for row in (of, *(with_eps(of, eps) for eps in EPS))]
TABLE = Table(
    "Size of the real data",
    "All 38,330 training pairs of the coloured sets, and 83,501 with those of one colour, which have other held-out "
    "pairs: compare their gains and not their scores.",
    tuple(on(row, *place) for place in PLACES for row in (CLIP, FROZEN, *FASTCLIPS)),
    tuple(
        Comparison(on(base, *place).name, on(better, *place).name)
        for place in PLACES
        for better in FASTCLIPS
        for base in (CLIP, FROZEN)
    ),
    scales=("real",),
)

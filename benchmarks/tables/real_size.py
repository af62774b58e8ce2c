"""How does the gain depend on the number of real pairs?"""

from dataclasses import replace

from ..experiments.real_pairs import ALL, COLOUR
from ..experiments.table import Comparison, Table
from .real_batch import at
from .real_settings import CLIP, FROZEN, V1, V3, with_eps


def on(row, data, batch):
    """`row` on more pairs."""
    name, label = f"{row.name}-pairs{data.pairs}-batch{batch}", f"{data.pairs:,} pairs, batch {batch}: {row.label}"
    return replace(at(row, batch), name=name, label=label, data=data, seeds=1)


DEFAULTS = (with_eps(V1, 1e-4), with_eps(V3, 1e-4))  # the eps of the flag's default
PLACES = {  # data and batch: the rows of FastCLIP
    (COLOUR, 32): (V1, with_eps(V1, 1e-3), *DEFAULTS),
    (ALL, 128): DEFAULTS,
}
TABLE = Table(
    "Size of the real data",
    "All 38,330 training pairs of the coloured sets, and 83,501 with those of one colour, which have other held-out "
    "pairs: compare their gains and not their scores.",
    tuple(on(row, *place) for place, losses in PLACES.items() for row in (CLIP, FROZEN, *losses)),
    tuple(
        Comparison(on(base, *place).name, on(better, *place).name)
        for place, losses in PLACES.items()
        for better in losses
        for base in (CLIP, FROZEN)
    ),
    scales=("real",),
)

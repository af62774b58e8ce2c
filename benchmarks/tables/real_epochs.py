"""Does the gain on real pairs last in a longer training?"""

from dataclasses import replace

from ..experiments.table import Comparison, Table
from .real_batch import NO_MEMORY
from .real_settings import CLIP, V1, V3

ROWS = [
    replace(row, name=f"{row.name}-epochs40", label=f"{row.label}, 40 epochs", epochs=40, seeds=1)
    for row in (CLIP, V1, NO_MEMORY, V3)
]
TABLE = Table(
    "Longer training on real pairs",
    "10,086 pairs for 40 epochs in place of 12, where gamma is 0.29 by default.",
    tuple(ROWS),
    tuple(Comparison(ROWS[0].name, row.name) for row in ROWS[1:]),
    scales=("real",),
)

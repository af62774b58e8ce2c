"""How does the gain on real pairs depend on the batch, and what part of it is the memory of u?"""

from dataclasses import replace

from ..experiments.table import Comparison, Table
from .real_settings import CLIP, FROZEN, V1, V3
from .scaling import settings_at

BATCHES = (32, 128, 512)  # the rows of the first are those of the table real
NO_MEMORY = replace(
    V1, name="real-v1-no-memory", label="fastclip-v1, gamma 1 (no memory)", flags={"--fastclip-gamma": 1.0}
)


def at(row, batch):
    """`row` at another batch, on one rank as always at scale real."""
    name, label = f"{row.name}-batch{batch}", f"{row.label}, batch {batch}"
    return replace(row, name=name, label=label, local=settings_at(row, batch), batch=batch)


TABLE = Table(
    "Batch on real pairs",
    "The same samples seen at growing batches, on one rank; the learning rate goes with the root of the batch and rho "
    "with its logarithm.",
    (
        *(at(row, BATCHES[0]) for row in (CLIP, FROZEN, V1, V3)),
        *(at(row, batch) for batch in BATCHES[1:] for row in (CLIP, FROZEN, V1, NO_MEMORY, V3)),
    ),
    tuple(
        Comparison(at(base, batch).name, at(better, batch).name)
        for better in (V1, V3)
        for base in (CLIP, FROZEN)
        for batch in BATCHES
    )
    + tuple(Comparison(at(FROZEN, batch).name, at(NO_MEMORY, batch).name) for batch in BATCHES[1:]),
    scales=("real",),
)

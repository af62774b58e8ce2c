"""Where does the time of a step go? From the traces of --profile; run it with nothing else running."""

from dataclasses import replace

from ..experiments.table import GLYPHS_AND_LARGER, LARGER, Table
from .settings import CLIP, V1, V2, V3

PROFILED = {"--profile": None}


def at(row, nodes):
    """One epoch of `row` with traces, the same batch a rank; at scale tiny as many ranks as nodes, at most two."""
    return replace(
        row, name=f"{row.name}-step-x{nodes}", label=f"{row.label}, x{nodes}", flags=PROFILED, nodes=nodes, ranks=nodes,
        larger=row.larger | {"--stop-epochs": 1}, batch=32 * nodes, epochs=1, curve=False, seeds=1,
        scales=GLYPHS_AND_LARGER if nodes <= 2 else LARGER,
    )  # fmt: skip


TABLE = Table(
    "Step time",
    "Milliseconds of a training step by what they are spent on, mean over the ranks: 1 to 8 nodes with the recipe's "
    "batch a GPU; at scale tiny 1 and 2 ranks with 32 pairs each on the CPU.",
    tuple(at(row, nodes) for nodes in (1, 2, 4, 8) for row in (CLIP, V1, V2, V3)),
    published=("step_time_ms_by_nodes.csv",),
    kind="step_time",
    notes="One run a row, and the profiler slows every operation: read what a step is made of here, and the cost of a "
    "loss from benchmarks.step_cost. The optimizer is the same in all rows, so the spread of its column is noise.",
)

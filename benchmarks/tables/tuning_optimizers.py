"""The learning rates from which optimizers.py takes its values: three of each optimizer, five of LAMB, one seed."""

from ..experiments.table import Table
from .optimizers import GRID, LABELS, with_optimizer

TABLE = Table(
    "Tuning of the optimizers",
    "fastclip-v3: mean R@1 on the tuning pairs, one seed.",
    tuple(
        with_optimizer(name, lr, name=f"v3-{name}-lr{lr:g}", label=f"{LABELS[name]}: lr {lr:g}")
        for name, rates in GRID.items()
        for lr in rates
    ),
    kind="tuning",
    scales=("tiny",),
)

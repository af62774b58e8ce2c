"""The grids from which settings.py takes its values, one seed a point; OpenCLIP has the larger budget.

OpenCLIP has five points over the learning rate and its temperature at the start, fastclip-v1 three over its constant
temperature, v3 and v2 three over rho; the choice is the best mean R@1 on the 1,000 tuning pairs. These runs are the
first seed of the other tables where the settings are the same. The frozen temperature is OpenCLIP's; fastclip-v0 has
v1's settings.
"""

from dataclasses import replace

from . import Table
from .settings import CLIP, V1, V2, V3

MIDDLE = 5e-4
RATES = (2.5e-4, MIDDLE, 1e-3)


def grid(row, flag, values, rates=(MIDDLE,)):
    """All learning rates at the middle one of the setting's three values, all values at the middle rate."""
    low, middle, high = values
    for lr, value in [(MIDDLE, low), *((lr, middle) for lr in rates), (MIDDLE, high)]:
        yield replace(
            row, name=f"{row.name}-lr{lr:g}-{flag.rsplit('-', 1)[1]}{value:g}",
            label=f"{row.label}: lr {lr:g}, {flag} {value:g}", tiny=row.tiny | {"--lr": lr, flag: value}, seeds=1,
        )  # fmt: skip


TABLE = Table(
    "Tuning",
    "Mean R@1 on the tuning pairs, one seed.",
    (
        *grid(CLIP, "--temperature", (0.04, 0.07, 0.15), RATES),
        *grid(V1, "--fastclip-temperature", (0.04, 0.07, 0.15)),
        *grid(V3, "--fastclip-rho", (1.5, 2.5, 3.5)),
        *grid(V2, "--fastclip-rho", (2.0, 3.5, 5.0)),
    ),
    kind="tuning",
    scales=("tiny",),
)

"""How long a memory of u is best on real pairs?"""

from dataclasses import replace

from ..experiments.table import Comparison, Table
from .real_settings import FROZEN, V1, V3

GAMMAS = (0.2, 1.0)


def _with(row, gamma):
    return replace(
        row, name=f"{row.name}-gamma-{gamma:g}", label=f"{row.label}, gamma {gamma:g}",
        flags={"--fastclip-gamma": gamma}, seeds=1,
    )  # fmt: skip


TABLE = Table(
    "Memory on real pairs",
    "The weight of the newest estimate of u over 12 visits: 0.2, the default of 0.69, and 1, which is no memory.",
    (FROZEN, *(row for of in (V1, V3) for row in (of, *(_with(of, gamma) for gamma in GAMMAS)))),
    tuple(Comparison(of.name, _with(of, gamma).name) for of in (V1, V3) for gamma in GAMMAS),
    scales=("real",),
)

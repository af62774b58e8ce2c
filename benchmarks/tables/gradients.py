"""Do the gradients of the paper's formulas differ in effect from those of the released code?"""

from dataclasses import replace

from ..experiments.table import Comparison, Table
from .settings import V2, V3

PAPER = {"--fastclip-gradients": "paper"}


def paper(row):
    return replace(row, name=f"{row.name}-paper", label=f"{row.label}, paper gradients", flags=PAPER, curve=False)


TABLE = Table(
    "Gradients",
    "v2 and v3 with the gradients of the released code, which made the published numbers, and of the paper's formulas. "
    "Only the released ones are tuned.",
    (V2, paper(V2), V3, paper(V3)),
    (Comparison("v2", "v2-paper"), Comparison("v3", "v3-paper")),
    notes="Read the gains against their standard errors: with Adam, which divides constant factors out, the two "
    "differ in v3 by the weight of one term of tau's gradient and in v2 by the weights of the samples.",
)

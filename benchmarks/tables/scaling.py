"""How does the gain depend on the size of the global batch?

The fewer-samples factor is the number of samples that OpenCLIP has seen at its end, divided by the number at which
fastclip-v3's mean R@1 first reaches OpenCLIP's final one, on the straight lines between its evaluations (mean curves of
all seeds). It is a lower bound of what a shorter run would need, since every run's learning rate falls to 0 at its end.
"""

import math
from dataclasses import replace

from ..experiments.table import Comparison, Table
from .settings import CLIP, FROZEN, V3

BATCHES = {32: 1, 64: 1, 128: 2, 256: 4}  # global batch: ranks, at scale tiny
NODES = (1, 2, 4, 8)
TINY_FROZEN = replace(FROZEN, scales=("tiny",))


def settings_at(row, batch):
    """`row.local` at another batch: the learning rate goes with the root of the batch, rho with the logarithm."""
    settings = row.local | {"--lr": float(f"{row.local['--lr'] * math.sqrt(batch / 32):.3g}")}
    if "--fastclip-rho" in settings:
        settings["--fastclip-rho"] = round(settings["--fastclip-rho"] * math.log(batch - 1) / math.log(31), 2)
    return settings


def at(row, batch, ranks, nodes):
    """`row` at another batch."""
    name, label, settings = f"{row.name}-x{nodes}", f"{row.label}, batch x{nodes}", settings_at(row, batch)
    return replace(row, name=name, label=label, local=settings, batch=batch, ranks=ranks, nodes=nodes)


TABLE = Table(
    "Scaling",
    "OpenCLIP and fastclip-v3 with the same samples seen at growing global batches: 1 to 8 nodes with the recipe's "
    "batch a GPU, at scale tiny batches of 32, 64, 128 and 256 on 1, 1, 2 and 4 ranks.",
    tuple(
        at(row, *settings, nodes)
        for settings, nodes in zip(BATCHES.items(), NODES, strict=True)
        for row in (CLIP, TINY_FROZEN if nodes == 1 else replace(TINY_FROZEN, seeds=1), V3)
    ),
    tuple(Comparison(f"clip-x{nodes}", f"v3-x{nodes}") for nodes in NODES),
    published=("imagenet_variants_by_nodes.csv",),
    published_gaps="gap_v3_minus_openclip_by_nodes.csv",
    notes="The published gap is smaller at 4 and 8 nodes than at 1 and 2. Ours closes and turns. The memory has a "
    "part in that: without it v1 is ahead of OpenCLIP at 128 and 256 pairs as well (see the map), as after 12 "
    "visits u still lags. We think that the other part is that with more negatives a batch no pair is solved so "
    "far that OpenCLIP's weight of it fades, which is what FastCLIP gains from here (see Memory and temperature). "
    "The learning rate goes with the root of the batch and rho with its logarithm; neither was tuned at these "
    "batches, where 256 pairs leave 216 steps in all.",
)

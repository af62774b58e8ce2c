"""What part of a gain is the memory of u, and what part the temperature?"""

from dataclasses import replace

from ..experiments.table import Comparison, Table
from .settings import CLIP, FROZEN, V1, V3

# With gamma 1 u is the batch's own g: what is left of the loss is that the right pair is not among the negatives.
NO_MEMORY = replace(
    V1, name="v1-no-memory", label="fastclip-v1, gamma 1 (no memory)", flags={"--fastclip-gamma": 1.0},
)  # fmt: skip
NO_MEMORY_V3 = replace(
    V3, name="v3-no-memory", label="fastclip-v3, gamma 1 (no memory)", flags={"--fastclip-gamma": 1.0}, curve=False,
)  # fmt: skip
SHORT_MEMORY = replace(
    V1, name="v1-short-memory", label="fastclip-v1, gamma 0.69 (the default for 12 epochs)",
    local=V1.local | {"--fastclip-gamma": 0.69}, scales=("tiny",),
)  # fmt: skip
TABLE = Table(
    "Memory and temperature",
    "FastCLIP with and without the memory of u, OpenCLIP with a learned and with a constant temperature.",
    (CLIP, FROZEN, NO_MEMORY, SHORT_MEMORY, V1, NO_MEMORY_V3, V3),
    (
        Comparison("clip-frozen", "v1-no-memory"),
        Comparison("v1-no-memory", "v1"),
        Comparison("v3-no-memory", "v3"),
        Comparison("clip", "clip-frozen"),
        Comparison("clip", "v3-no-memory"),
    ),
    notes="With 30% wrong captions the gain is there without any memory, and the memory takes part of it back; at "
    "15% wrong it adds a little (see the map). We think this is why: FastCLIP leaves the right pair out of g, so "
    "every anchor pulls with the same weight, while in OpenCLIP's loss an anchor's weight is 1 - p of its right "
    "pair: a pair that is solved fades, and a wrong caption, which cannot be solved, keeps all of its weight. A "
    "memory that lags behind does the same: where g has fallen since, g/u is below 1. So on clean pairs, where the "
    "solved ones may fade, the memory helps (see the map), and at 30% wrong and more a larger gamma is better, as "
    "the default rule gives for few epochs.",
)

"""Does gamma that falls by a cosine do better than a constant one?"""

from ..experiments.table import Comparison, Table
from .settings import ISOGCLR, SOGCLR, V1, V2

TABLE = Table(
    "Schedule of gamma",
    "Constant gamma from the second epoch on (sogclr, isogclr) against a cosine to the same value (v1, v2).",
    (SOGCLR, V1, ISOGCLR, V2),
    (Comparison("sogclr", "v1"), Comparison("isogclr", "v2")),
    published=("gamma_schedule.csv",),
    notes="The sign is the published one. At scale tiny the difference is large, and with a constant gamma the scores "
    "are below OpenCLIP's. We think that a constant gamma of 0.2, an average over five visits of 12 in all, gives the "
    "u of a much worse model (see Memory and temperature). sogclr and isogclr have the settings that were tuned for v1 "
    "and v2.",
)

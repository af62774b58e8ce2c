"""Which rule for the temperature is best?"""

from ..experiments.table import Table
from .settings import CLIP, FROZEN, V0, V1, V2, V3

TABLE = Table(
    "Temperature",
    "One learned temperature (v0, v3), one constant (v1), one per sample and modality (v2); OpenCLIP beside them.",
    (CLIP, FROZEN, V0, V1, V2, V3),
    published=("gamma_schedule.csv", "imagenet_variants_by_nodes.csv"),
    notes="On these data v0's temperature stays at its start, so v0 ends where v1 does, and so does OpenCLIP's; v3's, "
    "which rho pulls at, rises. The rule matters less here than the loss: the FastCLIP rows are within 1.5 points of "
    "one another. v2's temperatures fall to their lower bound of 0.01, or close to it, at every rho that was tried.",
)

"""Which loss is best on real image-text pairs?"""

from ..experiments.table import Comparison, Table
from .real_settings import CLIP, FROZEN, ISOGCLR, SIGLIP, SOGCLR, V0, V1, V2, V3, with_eps

V1_FADING, V3_FADING = (with_eps(row, 1e-4) for row in (V1, V3))  # the flag's default
TABLE = Table(
    "Real pairs",
    "All losses on 10,086 image-text pairs of icons, emoji and clip art, with the settings that were tuned for them.",
    (CLIP, FROZEN, SIGLIP, V0, V1, V1_FADING, V2, V3, V3_FADING, SOGCLR, ISOGCLR),
    (
        Comparison(CLIP.name, V3.name),
        Comparison(FROZEN.name, V3.name),
        Comparison(CLIP.name, V1.name),
        Comparison(FROZEN.name, V1.name),
        Comparison(SOGCLR.name, V1.name),
        Comparison(ISOGCLR.name, V2.name),
        Comparison(V1.name, V1_FADING.name),
        Comparison(V3.name, V3_FADING.name),
        Comparison(CLIP.name, FROZEN.name),
        Comparison(CLIP.name, SIGLIP.name),
    ),
    scales=("real",),
)

"""Which loss is best on real image-text pairs?"""

from ..experiments.table import Comparison, Table
from .real_settings import CLIP, FROZEN, ISOGCLR, SIGLIP, SOGCLR, V0, V1, V2, V3

TABLE = Table(
    "Real pairs",
    "All losses on 10,086 image-text pairs of icons, emoji and clip art, with the settings that were tuned for them.",
    (CLIP, FROZEN, SIGLIP, V0, V1, V2, V3, SOGCLR, ISOGCLR),
    (
        Comparison(CLIP.name, V3.name),
        Comparison(FROZEN.name, V3.name),
        Comparison(CLIP.name, V1.name),
        Comparison(FROZEN.name, V1.name),
        Comparison(SOGCLR.name, V1.name),
        Comparison(ISOGCLR.name, V2.name),
        Comparison(CLIP.name, FROZEN.name),
        Comparison(CLIP.name, SIGLIP.name),
    ),
    scales=("real",),
)

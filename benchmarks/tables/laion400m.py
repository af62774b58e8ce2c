"""Accuracy over samples seen on the largest data."""

from dataclasses import replace

from ..experiments.table import Comparison, Table
from .settings import CLIP, FROZEN, V3

EVALUATED = {"--imagenet-val": "$IMAGENET_VAL", "--zeroshot-frequency": 1}  # after every epoch
TABLE = Table(
    "LAION400M",
    "ImageNet top 1 over samples seen on LAION400M (scale xlarge); at scale tiny the curve of the glyph data.",
    (replace(CLIP, larger=EVALUATED), replace(FROZEN, scales=("tiny",)), replace(V3, larger=EVALUATED)),
    (Comparison("clip", "v3"),),
    published=("laion400m_imagenet_top1.csv",),
    scales=("tiny", "xlarge"),
)

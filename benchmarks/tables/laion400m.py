"""Accuracy over samples seen on the largest data."""

from dataclasses import replace

from . import Comparison, Table
from .settings import CLIP, FROZEN, V3

TABLE = Table(
    "LAION400M",
    "ImageNet top 1 over samples seen on LAION400M (scale xlarge); at scale tiny the curve of the glyph data.",
    (CLIP, replace(FROZEN, scales=("tiny",)), V3),
    (Comparison("clip", "v3"),),
    published="laion400m_imagenet_top1.csv",
    scales=("tiny", "xlarge"),
)

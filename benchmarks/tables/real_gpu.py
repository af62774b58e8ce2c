"""A larger model on larger pictures: ViT-S-16 at 64 px, on a GPU."""

from dataclasses import replace

from ..experiments.real_pairs import ALL
from ..experiments.table import Comparison, Table
from .real_settings import CLIP, FROZEN, V1, V3
from .scaling import settings_at

BATCH = 256
MODEL = {"--model": "ViT-S-16", "--force-image-size": 64}
GPU = {"--device": "cuda", "--precision": "amp_bf16", "--workers": 3}


def on_gpu(row):
    local = settings_at(row, BATCH) | {"--lr": 5e-4} | MODEL | GPU
    local |= {"--temperature": 0.07} if row.loss == "clip" else {}
    data = replace(ALL, size=64)
    return replace(row, name=f"{row.name}-gpu", local=local, data=data, batch=BATCH, epochs=5, seeds=1)


ROWS = [on_gpu(row) for row in (CLIP, FROZEN, V1, V3)]
TABLE = Table(
    "Real pairs on a GPU",
    "ViT-S-16 on all 83,501 pairs at 64 px, batch 256, 5 epochs; nothing was tuned for it: all begin at tau 0.07.",
    tuple(ROWS),
    tuple(Comparison(base.name, better.name) for better in ROWS[2:] for base in ROWS[:2]),
    scales=("real",),
)

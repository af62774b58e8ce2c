"""A larger model on larger pictures: ViT-S-16 at 64 px, on a GPU."""

from dataclasses import replace

from ..experiments.real_pairs import ALL
from ..experiments.table import Comparison, Table
from .real_settings import CLIP, FROZEN, V1, V3

BATCH = 256
MODEL = {"--model": "ViT-S-16", "--force-image-size": 64}
GPU = {"--device": "cuda", "--precision": "amp_bf16", "--workers": 3}


SETTINGS = {  # nothing is tuned; rho is the flag's default at this batch
    "clip": {"--temperature": 0.07},
    "fastclip-v1": {"--fastclip-temperature": 0.07},
    "fastclip-v3": {"--fastclip-rho": 5.2},
}


def on_gpu(row):
    """`row` as it is trained on the GPU."""
    local, data = {"--lr": 5e-4} | SETTINGS[row.loss] | MODEL | GPU, replace(ALL, size=64)
    return replace(row, name=f"{row.name}-gpu", local=local, data=data, batch=BATCH, epochs=5, seeds=1)


ROWS = [on_gpu(row) for row in (CLIP, FROZEN, V1, V3)]
TABLE = Table(
    "Real pairs on a GPU",
    "ViT-S-16 on all 83,501 pairs at 64 px, batch 256, 5 epochs. Nothing was tuned for it: lr 5e-4, tau 0.07 at the "
    "start, rho by default.",
    tuple(ROWS),
    tuple(Comparison(base.name, better.name) for better in ROWS[2:] for base in ROWS[:2]),
    scales=("real",),
)

"""The losses at scale real with the settings that real_tuning.py chose, as the rows that several tables share.

rho is the flag's default at 32 pairs. What is not here has the flags' defaults, as gamma: 0.69 at 12 epochs.
"""

from dataclasses import replace

from ..experiments.real_pairs import TENTH
from ..experiments.table import Row

RATE = 5e-4
CLIP = Row(
    "real-clip", "OpenCLIP", "clip", local={"--lr": RATE, "--temperature": 0.07}, data=TENTH, curve=True,
    scales=("real",),
)  # fmt: skip
FROZEN = replace(
    CLIP, name="real-clip-frozen", label="OpenCLIP, temperature frozen", flags={"--freeze-temperature": None},
    local={"--lr": RATE, "--temperature": 0.04},
)  # fmt: skip
SIGLIP = replace(CLIP, name="real-siglip", label="SigLIP", loss="siglip", local={"--lr": 1e-3}, curve=False)
V1 = replace(
    CLIP, name="real-v1", label="fastclip-v1", loss="fastclip-v1", local={"--lr": RATE, "--fastclip-temperature": 0.07}
)
V0 = replace(V1, name="real-v0", label="fastclip-v0", loss="fastclip-v0", curve=False)
SOGCLR = replace(V1, name="real-sogclr", label="sogclr (v1, gamma constant)", loss="sogclr", curve=False)
V2 = replace(
    CLIP, name="real-v2", label="fastclip-v2", loss="fastclip-v2", local={"--lr": RATE, "--fastclip-rho": 3.47},
    curve=False,
)  # fmt: skip
ISOGCLR = replace(V2, name="real-isogclr", label="isogclr (v2, gamma constant)", loss="isogclr")
V3 = replace(
    CLIP, name="real-v3", label="fastclip-v3", loss="fastclip-v3", local={"--lr": RATE, "--fastclip-rho": 3.22}
)


def with_eps(row, eps):
    """A FastCLIP row with another --fastclip-eps than the published 1e-14."""
    name, label = f"{row.name}-eps-{eps:g}", f"{row.label}, eps {eps:g}"
    return replace(row, name=name, label=label, flags={"--fastclip-eps": eps})

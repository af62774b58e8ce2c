"""The losses, at scale tiny with the settings that tuning.py chose, as the rows that several tables share."""

from dataclasses import replace

from ..experiments.table import Row

LEARNED = {"--lr": 2.5e-4, "--temperature": 0.07}
CLIP = Row("clip", "OpenCLIP", "clip", local=LEARNED, curve=True)
FROZEN = Row(
    "clip-frozen", "OpenCLIP, temperature frozen", "clip", {"--freeze-temperature": None},
    local=LEARNED, larger={"--temperature": 0.07},
)  # fmt: skip
CONSTANT = {"--lr": 5e-4, "--fastclip-gamma": 0.2, "--fastclip-temperature": 0.07}
V0 = Row("v0", "fastclip-v0", "fastclip-v0", local=CONSTANT)
V1 = Row("v1", "fastclip-v1", "fastclip-v1", local=CONSTANT)
V2 = Row("v2", "fastclip-v2", "fastclip-v2", local={"--lr": 5e-4, "--fastclip-gamma": 0.2, "--fastclip-rho": 5.0})
V3 = Row(
    "v3", "fastclip-v3", "fastclip-v3", curve=True,
    local={"--lr": 5e-4, "--fastclip-gamma": 0.2, "--fastclip-rho": 1.5, "--fastclip-tau-lr": 1e-3},
)  # fmt: skip
SOGCLR = replace(V1, name="sogclr", label="sogclr (v1, gamma constant)", loss="sogclr")
ISOGCLR = replace(V2, name="isogclr", label="isogclr (v2, gamma constant)", loss="isogclr")

"""The map of regimes again: fastclip-v1 and v3 as the defaults of the flags set them, without memory, with other eps.

At 12 epochs the default of gamma is 0.69, where the map has 0.2; rho is the default at the batch. eps is the published
1e-14, without memory too, the default of 1e-4, and 1e-3. The rows of OpenCLIP are the map's.
"""

from dataclasses import replace

from ..experiments.table import Comparison, Row, Table
from .eps import GAMMAS, SETTINGS, SMALL, SMALLER
from .map import REGIMES, ROWS
from .scaling import settings_at

WHERE = (
    "wrong0", "wrong30", "partial", "tail", "alike0", "alike30", "batch128", "clean39000", "pairs39000",
)  # fmt: skip
CHANGES = {"": {}, ", gamma 1": GAMMAS[", gamma 1"]} | {  # eps is 1e-14 in the first two
    f", eps {eps}": {"--fastclip-eps": float(eps)} for eps in (SMALL, SMALLER)
}
OTHERS = {  # on USUAL alone: eps 1e-14 and the default of most
    "fastclip-v0": {"--lr": 5e-4, "--fastclip-temperature": 0.07},
    "fastclip-v2": {"--lr": 5e-4, "--fastclip-rho": 3.47},
    "sogclr": {"--lr": 5e-4, "--fastclip-temperature": 0.07},
    "isogclr": {"--lr": 5e-4, "--fastclip-rho": 3.47},
}
USUAL = ("wrong0", "wrong30")
LARGER_RHO = 5.0  # of v3, on many clean pairs alone, where its tau rises: below ln(1/eps), 6.9 at 1e-3


def _row(regime, loss, change, seeds):
    said, data, _ = REGIMES[regime]
    batch = int(regime.removeprefix("batch")) if regime.startswith("batch") else 32
    name = f"defaults-{regime}-{loss}{change.replace(', ', '-').replace(' ', '-')}"
    label = f"{said}: {loss}{change}" + ("" if "eps" in change else ", eps 1e-14")
    settings = {"local": (SETTINGS | OTHERS)[loss], "data": data, "batch": batch}
    row = Row(name, label, loss, CHANGES[change], **settings, scales=("tiny",), seeds=seeds)
    return replace(row, local=settings_at(row, batch))


def _rows(regime):
    usual = regime in USUAL
    rows = [_row(regime, loss, change, 3 if usual else 1) for loss in SETTINGS for change in CHANGES]
    others = [_row(regime, loss, change, 1) for loss in OTHERS for change in ("", f", eps {SMALLER}")]
    return rows + others if usual else rows


_CLIPS = {regime: [row for row in ROWS[regime] if row.loss == "clip"] for regime in WHERE}
_FASTCLIPS = {regime: _rows(regime) for regime in WHERE}
_V3 = _row("clean39000", "fastclip-v3", f", eps {SMALL}", 1)
_FASTCLIPS["clean39000"].append(
    replace(
        _V3, name=f"{_V3.name}-rho-{LARGER_RHO:g}", label=f"{_V3.label}, rho {LARGER_RHO:g}",
        local=_V3.local | {"--fastclip-rho": LARGER_RHO},
    )
)  # fmt: skip
TABLE = Table(
    "Map of regimes, with the defaults",
    "The map again with the defaults of the flags, of which eps is 1e-4 for most losses. Beside it the published 1e-14,"
    " that without memory (gamma 1), and 1e-3.",
    tuple(row for regime in WHERE for row in (*_CLIPS[regime], *_FASTCLIPS[regime])),
    tuple(Comparison(clip.name, row.name) for regime in WHERE for clip in _CLIPS[regime] for row in _FASTCLIPS[regime]),
    scales=("tiny",),
)

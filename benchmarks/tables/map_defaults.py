"""The map of regimes again: fastclip-v1 and v3 as the defaults of the flags set them.

At 12 epochs the default of gamma is 0.69, where the map has 0.2; rho is the default at the batch. eps is the default of
1e-4, and where it matters the published 1e-14 or 1e-3 too. The rows of OpenCLIP are the map's.
"""

from dataclasses import replace

from ..experiments.table import Comparison, Row, Table
from .eps import GAMMAS, SETTINGS, SMALL, SMALLER
from .map import REGIMES, ROWS
from .scaling import settings_at

WHERE = (
    "wrong0", "wrong30", "partial", "tail", "alike0", "alike30", "batch128", "clean39000", "pairs39000",
)  # fmt: skip
FADING, MORE = f", eps {SMALLER}", f", eps {SMALL}"  # the default, and a larger eps
PUBLISHED, NO_MEMORY = "", ", gamma 1"  # eps is 1e-14 in both
CHANGES = {PUBLISHED: {}, NO_MEMORY: GAMMAS[NO_MEMORY]} | {
    f", eps {eps}": {"--fastclip-eps": float(eps)} for eps in (SMALLER, SMALL)
}
BESIDE = {  # what is run beside FADING
    "wrong0": (PUBLISHED, MORE), "wrong30": (PUBLISHED, MORE), "tail": (MORE,), "batch128": (NO_MEMORY,),
    "clean39000": (PUBLISHED, MORE), "pairs39000": (PUBLISHED, MORE),
}  # fmt: skip
OTHERS = {loss: {"--lr": 5e-4, "--fastclip-temperature": 0.07} for loss in ("fastclip-v0", "sogclr")}  # on USUAL alone
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
    changes = (*BESIDE.get(regime, ()), FADING)
    rows = [_row(regime, loss, change, 3 if usual else 1) for loss in SETTINGS for change in changes]
    others = [_row(regime, loss, change, 1) for loss in OTHERS for change in (PUBLISHED, FADING)]
    return rows + others if usual else rows


_CLIPS = {regime: [row for row in ROWS[regime] if row.loss == "clip"] for regime in WHERE}
_FASTCLIPS = {regime: _rows(regime) for regime in WHERE}
_V3 = _row("clean39000", "fastclip-v3", MORE, 1)
_FASTCLIPS["clean39000"].append(
    replace(
        _V3, name=f"{_V3.name}-rho-{LARGER_RHO:g}", label=f"{_V3.label}, rho {LARGER_RHO:g}",
        local=_V3.local | {"--fastclip-rho": LARGER_RHO},
    )
)  # fmt: skip
TABLE = Table(
    "Map of regimes, with the defaults",
    "The map again with the defaults of the flags, of which eps is 1e-4 for most losses. Beside it, where it "
    "matters, the published 1e-14, 1e-3, and no memory (gamma 1).",
    tuple(row for regime in WHERE for row in (*_CLIPS[regime], *_FASTCLIPS[regime])),
    tuple(Comparison(clip.name, row.name) for regime in WHERE for clip in _CLIPS[regime] for row in _FASTCLIPS[regime]),
    scales=("tiny",),
)

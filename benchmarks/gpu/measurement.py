"""What a part is told, and the rows that it yields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """Where a part runs, and whether with sizes for a CPU."""

    device: str  # "cuda" or "cpu"
    small: bool

    @property
    def precision(self) -> str:
        """--precision of the training runs."""
        return "amp_bf16" if self.device == "cuda" else "fp32"


def row(name: str, case: Mapping[str, Any], figures: Mapping[str, Any], ok: bool | None = None) -> dict[str, Any]:
    """One measurement: what it is of (name and case, the same in every run), what was found, and whether that is right.

    ok is None for what is measured and not judged. Names of figures end in their unit (_ms, _s, _bytes).
    """
    return {"name": name, "case": dict(case), "figures": dict(figures), "ok": ok}


def relative(actual: Any, expected: Any) -> float:
    """Largest difference over the largest magnitude, infinities apart; inf where those, or a NaN, are elsewhere."""
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    infinite = expected.isinf()
    if actual.isnan().any() or not torch.equal(actual[infinite], expected[infinite]):
        return math.inf
    difference = (actual - expected)[~infinite].abs()
    return float(difference.max() / expected[~infinite].abs().max().clamp_min(1e-300)) if difference.numel() else 0.0


def relative_norm(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; inf where it is no number."""
    actual, expected = (x.detach().double().cpu() for x in (actual, expected))
    error = float((actual - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error

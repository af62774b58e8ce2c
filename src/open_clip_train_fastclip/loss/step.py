"""What one step of FastCLIPLoss carries from call to call; shapes are those of fastclip.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .parts import Copies, Parts, State


@dataclass
class Step:
    """What a step knows of its samples."""

    ids_b: Tensor  # as given
    places_B: Tensor  # rows of the samples of the global batch in this rank's part of the table
    copies: Copies
    rows: Callable[[], Tensor]  # waits for the old rows [B, C]
    announced: bool  # by begin_step: every call until the next begin_step belongs to it
    moves: bool  # u and tau
    parts: Parts  # what computes it
    update: "Update | None" = None  # set by the step's first call


@dataclass
class Update:
    """What the first call of a step leaves to its later ones, which reuse it, and to undo_step()."""

    tau: Tensor  # the step's, before it moved: 0-d, or [B, 2] with individual temperatures
    log_eps_u_B2: Tensor  # log(eps + new u)
    value: Tensor
    rows_BC: Tensor  # the old ones
    before: State


class LastStep(NamedTuple):
    """What FastCLIPLoss.metrics() tells of the last step, as it is in memory: nothing is computed for it in a step."""

    rows_BC: Tensor  # the new ones
    log_u_before_b2: Tensor  # of this rank's anchors, -inf where they were seen for the first time
    log_g_b2: Tensor

"""What FastCLIPLoss knows in the course of a step. Shapes and suffixes are those of fastclip.py."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import functional


@dataclass
class Step:
    """What a step knows of its samples."""

    ids_b: Tensor  # as given
    ids_B: Tensor
    last_B: Tensor  # position of the last copy of the same sample in the global batch
    copies_B: Tensor  # at a last copy: how many copies there are; elsewhere 0
    rows: Callable[[], Tensor]  # waits for the old rows [B, C]
    announced: bool  # by begin_step: every call until the next begin_step belongs to it
    moves: bool = True  # u and tau
    update: "Update | None" = None  # set by the step's first call


@dataclass
class Update:
    """What the first call of a step leaves to its later ones, which reuse it."""

    tau_B2: Tensor  # the step's tau, before it moved
    log_eps_u_B2: Tensor  # log(eps + new u)
    value: Tensor
    before: "Before"


@dataclass
class Before:
    """What a step found and moves, for undo_step()."""

    rows_BC: Tensor
    visited: Tensor
    mean_individual_tau: Tensor
    global_tau: tuple[Tensor, ...]  # GlobalTemperature.NAMES; empty with individual temperatures


@dataclass
class Contrast:
    """Local anchors against the global batch, in one call of the loss."""

    items: tuple[Tensor, Tensor]  # local image and text features [b, d], in the precision of the arithmetic
    logits: tuple[functional.Logits, functional.Logits]  # image anchors to texts, text anchors to images
    diagonal_b: Tensor
    log_g_b2: Tensor
    mean_h_b2: Tensor

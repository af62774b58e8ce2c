"""The small operations of parts.py: the new u and tau, the value, and what the gradients are weighed by.

Shapes and symbols are those of fastclip.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import functional
from .config import GCL_WITHOUT_TAU, RGCL_G, FastCLIPConfig
from .functional import LOG2_E
from .fused import fused
from .temperature import global_gradient, individual_adam_at, move_global, move_individual, tau_lr_at


def epoch_numbers(config: FastCLIPConfig, epoch: int, gamma: float) -> Tensor:
    """What an epoch's steps have in common: log(1 - gamma), log gamma, log eps, and individual_adam_at()."""
    log_keep = math.log1p(-gamma) if gamma < 1 else -math.inf
    numbers = [log_keep, math.log(gamma), math.log(config.eps), *individual_adam_at(config, epoch)]
    return torch.tensor(numbers, dtype=config.table_dtype)


class Local(NamedTuple):
    """New values of this rank's anchors."""

    log_g_b2: Tensor
    log_u_b2: Tensor
    tau: tuple[Tensor, ...]  # with individual temperatures: tau, m and v, [b, 2] each
    slope: Tensor | None  # 0-d, minus the sum of tau d_tau g / (eps + u) over the anchors; None with a constant tau


@fused
def local_moves(
    diagonal_b: Tensor,
    sums: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    tau: Tensor,
    rows_bC: Tensor,
    copies_b: Tensor | None,
    numbers: Tensor,
    peak_rate: Tensor,
    pairs: int,
    config: FastCLIPConfig,
) -> Local:
    """u of the local anchors and, with individual temperatures, their tau. tau: 0-d or [b, 2]; pairs: B."""
    dtype = rows_bC.dtype
    log_keep, log_gamma, log_eps, *adam = numbers.unbind()
    own_b2 = diagonal_b[:, None] / tau.to(diagonal_b.dtype)
    log_g_b2, mean_h_b2 = functional.log_g(*sums, own_b2, pairs)
    log_u_b2 = functional.updated_log_u(rows_bC[:, :2], log_g_b2.to(dtype), log_keep, log_gamma)
    if mean_h_b2 is None:
        return Local(log_g_b2, log_u_b2, (), None)
    log_eps_u_b2 = functional.log_weight_denominator(log_u_b2, log_eps)
    slope_b2 = mean_h_b2.to(dtype) * (log_g_b2.to(dtype) - log_eps_u_b2).exp_()
    if config.individual_tau:
        gradient_b2 = log_eps_u_b2 + config.rho - slope_b2
        moments = rows_bC[:, 2:4], rows_bC[:, 4:6], rows_bC[:, 6:8]
        return Local(log_g_b2, log_u_b2, move_individual(config, moments, gradient_b2, peak_rate, tuple(adam)), None)
    # Copies of a sample all take the values of the last one, so it stands for them in the sum as well.
    slope = slope_b2.sum() if copies_b is None else (slope_b2.sum(1) * copies_b).sum()
    return Local(log_g_b2, log_u_b2, (), slope)


class Moved(NamedTuple):
    """What the whole global batch becomes, the same on every rank."""

    rows_BC: Tensor  # the old ones where the step is not usable
    usable: Tensor  # 0-d bool
    log_eps_u_B2: Tensor
    value: Tensor
    global_tau: Tensor | None  # GlobalTemperature.numbers
    visited: Tensor  # 0-d, samples that have been seen for the first time
    tau_moved: Tensor | None  # 0-d, how far individual temperatures moved in sum


@fused
def global_moves(
    diagonal_B: Tensor,
    columns_B2: tuple[Tensor, ...],
    slopes_K: Tensor | None,
    old_BC: Tensor,
    copies: tuple[Tensor | None, Tensor | None],
    tau: Tensor,
    global_tau: Tensor | None,
    numbers: Tensor,
    peak_rate: Tensor,
    config: FastCLIPConfig,
) -> Moved:
    """From every anchor's new values: the rows to keep, the value, and a global tau's move.

    columns_B2: log u and, with individual temperatures, tau, m, v; copies: parts.Copies.
    """
    new_BC = torch.cat(columns_B2, dim=1) if config.individual_tau else columns_B2[0]
    last_B, copies_B = copies
    if last_B is not None:
        new_BC = new_BC[last_B]
    usable = is_usable(diagonal_B)
    log_eps_u_B2 = functional.log_weight_denominator(new_BC[:, :2], numbers[2])
    if slopes_K is not None and global_tau is not None:
        a = slopes_K.sum() / -len(new_BC)
        gradient = global_gradient(config, a, new_BC[:, :2], log_eps_u_B2, tau)
        global_tau = move_global(config, global_tau, gradient, tau_lr_at(config, peak_rate, tau), tau, usable)
    rows_BC = torch.where(usable, new_BC, old_BC)
    first_visit_B = (old_BC[:, 0] == -math.inf) & (rows_BC[:, 0] != -math.inf)
    moved_B = (rows_BC - old_BC)[:, 2:4].sum(1) if config.individual_tau else None
    if copies_B is not None:
        first_visit_B = first_visit_B & (copies_B > 0)
        moved_B = None if moved_B is None else moved_B * (copies_B > 0)
    tau_moved = None if moved_B is None else moved_B.sum()
    value = objective(config, log_eps_u_B2, tau)
    return Moved(rows_BC, usable, log_eps_u_B2, value, global_tau, first_visit_B.sum(), tau_moved)


def is_usable(diagonal_B: Tensor) -> Tensor:
    """Whether all features were finite, 0-d bool: any other one shows in its pair's diagonal."""
    return diagonal_B.abs().amax() < math.inf


def objective(config: FastCLIPConfig, log_eps_u_B2: Tensor, tau: Tensor) -> Tensor:
    """The objective: GCL, its form without the factor tau (v0), RGCL (v2, isogclr) or RGCL-g (v3)."""
    if config.individual_tau:
        return 2 * (tau * (log_eps_u_B2 + config.rho)).mean()
    value = 2 * log_eps_u_B2.mean()
    if config.algorithm.objective == GCL_WITHOUT_TAU:
        return value
    return tau * (value + 2 * config.rho if config.algorithm.objective == RGCL_G else value)


@fused
def weight_biases(
    diagonal_B: Tensor,
    log_eps_u_B2: Tensor,
    log_g_b2: Tensor,
    tau: Tensor,
    first: int,
    world_size: int,
    config: FastCLIPConfig,
) -> tuple[Tensor, Tensor]:
    """What functional.pair_weights() subtracts from the exponents [B, 2], and minus the share of the own pairs [b, 1].

    The gradients are K times this rank's part of G_w. Its own pair is in every exponent of an anchor, with minus the
    sum of the anchor's weights, here of both its modalities, which is known from g. first: place of anchor 0.
    """
    B, b = len(diagonal_B), len(log_g_b2)
    released = config.gradients == "released"
    factor = world_size / B / (2 if released else 1)
    log_factor_B2 = math.log(factor / (B - 1)) - log_eps_u_B2
    # Both have tau once as a factor of the objective and once in the denominator of the exponent.
    if config.algorithm.objective != RGCL_G if released else config.algorithm.objective == GCL_WITHOUT_TAU:
        log_factor_B2 = log_factor_B2 - tau.log()
    bias_B2 = diagonal_B[:, None] * (LOG2_E / tau) - log_factor_B2 * LOG2_E
    share_b1 = (log_g_b2 + log_factor_B2[first : first + b]).exp().sum(1, keepdim=True) * (1 - B)
    return bias_B2.to(log_g_b2.dtype), share_b1.to(log_g_b2.dtype)

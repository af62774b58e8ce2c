"""The arithmetic of FastCLIP: pure functions of tensors, no state, no communication.

Shapes: b anchors of this rank, B pairs of the global batch, t columns of one tile, d width of the embedding.
Of a pair i, "diagonal" is e1_i . e2_i and h_ij = (similarity_ij - diagonal_i) / tau_i (paper, Section 3).
A tile holds logits l_ij = log2(e) similarity_ij / tau_i (logits.py). They and the biases are in base 2, because torch's
exp2 is much faster than its exp on a CPU (Sleef, not MKL).
"""

import math

import torch
from torch import Tensor

from .fused import fused

EXCLUDED = -1e30  # logit of a pair that does not count: exp of it is 0, and 0 times it is 0, not NaN
LOG2_E = math.log2(math.e)
Taus = tuple[Tensor, Tensor]  # individual temperatures of a tile's anchors, [b], and of its items as anchors, [t]
Places = tuple[Tensor, Tensor]  # [b] and [t], equal numbers for features of one sample: such a pair does not count


@fused
def last_copies(ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """For each position of `ids_B` the position of the last equal id, and how many equal ids end there (else 0)."""
    B = len(ids_B)
    sorted_B, order_B = ids_B.sort(stable=True)
    ends_B = torch.ones_like(sorted_B, dtype=torch.bool)
    ends_B[:-1] = sorted_B[1:] != sorted_B[:-1]
    end_B = torch.where(ends_B, torch.arange(B, device=ids_B.device), B)
    end_B = end_B.flip(0).cummin(0).values.flip(0)
    last_B = torch.empty_like(ids_B).index_copy_(0, order_B, order_B[end_B])
    copies_B = torch.zeros_like(ids_B).index_add_(0, last_B, torch.ones_like(ids_B))
    return last_B, copies_B


def are_distinct(ids_B: Tensor) -> bool:
    """Whether no id comes twice; only for ids on the CPU, since the host would wait for others."""
    sorted_B = ids_B.sort().values
    return bool((sorted_B[1:] != sorted_B[:-1]).all())


@fused
def row_sums(tile_bt: Tensor, places: Places | None, with_mean: bool) -> tuple[Tensor, ...]:
    """Of each row the largest logit, the sum of 2^(logit - largest) and, with_mean, that sum weighted by the logits."""
    if places is not None:
        tile_bt = torch.where(_same(places), EXCLUDED, tile_bt)
    largest_b = tile_bt.amax(1)
    exp_bt = (tile_bt - largest_b[:, None]).exp2_()
    total_b = exp_bt.sum(1)
    return (largest_b, total_b, exp_bt.mul_(tile_bt).sum(1)) if with_mean else (largest_b, total_b)


@fused
def column_sums(tile_bt: Tensor, places: Places | None, with_mean: bool, taus: Taus | None) -> tuple[Tensor, ...]:
    """row_sums() with the columns as anchors, on one rank. taus: None where all are one."""
    by_columns: tuple[Tensor, ...] = row_sums(_of_columns(tile_bt, taus).T, places and places[::-1], with_mean)
    return by_columns


def merged(sums: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """row_sums() of two tiles side by side."""
    largest_b = torch.maximum(sums[0], more[0])
    shrink_b, shrink_more_b = (sums[0] - largest_b).exp2_(), (more[0] - largest_b).exp2_()
    return largest_b, *(s * shrink_b + m * shrink_more_b for s, m in zip(sums[1:], more[1:], strict=True))


def log_g(
    image_sums: tuple[Tensor, ...], text_sums: tuple[Tensor, ...], own_b2: Tensor, pairs: int
) -> tuple[Tensor, Tensor | None]:
    """log g [b, 2] and, if the sums have it, the mean exponent [b, 2]; column 0 is of image anchors, 1 of text anchors.

    g_i = 1/(B-1) sum_{j: id_j != id_i} exp(h_ij); log g_i is -inf where no j is left. The mean exponent is
    sum_j h_ij exp(h_ij) / sum_j exp(h_ij), since tau d_tau g = -g times it.
    own_b2: diagonal / tau; pairs: B.
    """
    both = [vector for pair in zip(image_sums, text_sums, strict=True) for vector in pair]
    largest_b2, total_b2, *weighted_b2 = torch.stack(both, dim=1).unflatten(1, (-1, 2)).unbind(1)
    nobody_b2 = largest_b2 < EXCLUDED / 1e3  # column_sums() may have scaled it by up to TAU_MIN / TAU_MAX
    log_g_b2 = (largest_b2 + total_b2.log2()) * (1 / LOG2_E) - (own_b2 + math.log(pairs - 1))
    log_g_b2 = log_g_b2.masked_fill_(nobody_b2, -math.inf)
    if not weighted_b2:
        return log_g_b2, None
    mean_h_b2 = weighted_b2[0] / total_b2 * (1 / LOG2_E) - own_b2
    return log_g_b2, mean_h_b2.masked_fill_(nobody_b2, 0.0)


def updated_log_u(log_u: Tensor, log_g: Tensor, log_keep: Tensor, log_gamma: Tensor) -> Tensor:
    """log of (1-gamma) u + gamma g, elementwise; a sample that was never seen (log u = -inf) starts at g."""
    mixed = torch.logaddexp(log_u + log_keep, log_g + log_gamma)
    return torch.where(log_u == -math.inf, log_g, mixed)


def log_weight_denominator(log_u: Tensor, log_eps: Tensor) -> Tensor:
    """log(eps + u), elementwise."""
    return torch.logaddexp(log_u, log_eps)


@fused
def pair_weights(
    tile_bt: Tensor,
    places: Places | None,
    row_bias_b: Tensor,
    column_bias_t: Tensor,
    taus: Taus | None,
) -> Tensor:
    """W_ij = 2^(l_ij - row_bias_i) + 2^(log2(e) s_ij / tau_j - column_bias_j), by which features pull at each other.

    The first term is anchor i against everybody, the second everybody's anchors (of the other modality) against item
    i. taus: None where all are one. The biases hold the diagonal, log(eps + u) and the factors of the objective, so
    that each exponent is that of the final weight, which u bounds: nothing overflows at tau = 0.01.
    """
    weight_bt = (tile_bt - row_bias_b[:, None]).exp2_()
    weight_bt += (_of_columns(tile_bt, taus) - column_bias_t).exp2_()
    return weight_bt if places is None else torch.where(_same(places), 0.0, weight_bt)


def _of_columns(tile_bt: Tensor, taus: Taus | None) -> Tensor:
    """The logits with the temperatures of the columns."""
    return tile_bt if taus is None else tile_bt * (taus[0][:, None] / taus[1])


def _same(places: Places) -> Tensor:
    return places[0][:, None] == places[1]

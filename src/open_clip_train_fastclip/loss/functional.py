"""The arithmetic of FastCLIP: pure functions of tensors, no state, no communication.

Shapes: b anchors of this rank, B pairs of the global batch, t columns of one tile, d width of the embedding.
Of a pair i, "diagonal" is e1_i . e2_i and h_ij = (similarity_ij - diagonal_i) / tau_i (paper, Section 3).

Each direction needs the b x B similarities twice: for g, which the new u depends on, and for the gradient, which
needs everybody's new u. They are walked through in tiles of columns, so the exponentials stay in the cache and never
fill a b x B matrix. Up to b*B = KEPT_ELEMENTS the similarities themselves are kept between the two walks (8 bytes an
element for both directions); beyond, they are computed again and memory is linear in B.

Within a tile exponents are in base 2, because torch's exp2 is much faster than its exp on a CPU (Sleef, not MKL).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

KEPT_ELEMENTS = 2**23
TILE_ELEMENTS = {"cpu": 2**18}  # a tile that stays in a core's cache
TILE_ELEMENTS_GPU = 2**24  # few large kernels
EXCLUDED = -1e30  # similarity of a pair that does not count: exp of it is 0, and 0 times it is 0, not NaN
LOG2_E = math.log2(math.e)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision of their operands: no autocast, no TF32 and, on a CPU, no bf16 for float32.

    At tau = 0.01 an error of 1e-3 in a similarity changes exp(h) by a tenth. In float32 an exponent of up to 96 is off
    by less than 1e-4 there, also with bf16 features.
    """
    # torch 2.9 and newer refuse the old switch once somebody has used the new ones
    switches: Any = torch.backends
    backends, switch = [switches.cuda.matmul], "allow_tf32"
    exact: bool | str = False
    if hasattr(switches.cuda.matmul, "fp32_precision"):
        backends, switch, exact = [switches.cuda.matmul, switches.mkldnn.matmul], "fp32_precision", "ieee"
    before = [getattr(backend, switch) for backend in backends]
    with torch.autocast(device.type, enabled=False):
        try:
            for backend in backends:
                setattr(backend, switch, exact)
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                setattr(backend, switch, value)


class Logits:
    """l_ij = log2(e) similarity_ij / tau_i of b anchors with the B items of the other modality, tile by tile.

    anchors_bd and items_Bd are L2-normalised features, tau_b the anchors' temperatures, places_b and places_B a number
    for each feature that is equal for features of one sample: a position in the global batch.
    A pair of equal numbers (the anchor's own among them) gets EXCLUDED.
    Iterating yields (slice of columns, tile [b, t]); the tiles must not be changed.
    """

    def __init__(self, anchors_bd: Tensor, tau_b: Tensor, items_Bd: Tensor, places_b: Tensor, places_B: Tensor):
        self.anchors_bd, self.tau_b, self.items_Bd = anchors_bd, tau_b, items_Bd
        self.scaled_anchors_bd = anchors_bd * (LOG2_E / tau_b)[:, None]
        # As floating point (exact up to 2^24): adding a float mask is faster than masked_fill with a bool one.
        self.places_b1, self.places_B = places_b.to(items_Bd.dtype)[:, None], places_B.to(items_Bd.dtype)
        b, B = len(anchors_bd), len(items_Bd)
        width = max(1, TILE_ELEMENTS.get(anchors_bd.device.type, TILE_ELEMENTS_GPU) // b)
        self._slices = [slice(start, min(start + width, B)) for start in range(0, B, width)]
        self._kept: list[Tensor] | None = [] if b * B <= KEPT_ELEMENTS else None

    def transposed(self, tau_b: Tensor) -> "Logits":
        """Logits of the items as anchors, on one rank (b = B): what was kept serves both, one product fewer."""
        other = Logits(self.items_Bd, tau_b, self.anchors_bd, self.places_B, self.places_B)
        if self._kept is not None:
            kept_BB = torch.cat(self._kept, dim=1) * (self.tau_b[:, None] / tau_b)
            other._kept = [kept_BB[columns].T for columns in other._slices]
        return other

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for number, columns in enumerate(self._slices):
            if self._kept is not None and number < len(self._kept):
                yield columns, self._kept[number]
                continue
            tile_bt = self.scaled_anchors_bd @ self.items_Bd[columns].T
            same_bt = torch.eq(self.places_b1, self.places_B[columns], out=torch.empty_like(tile_bt))
            tile_bt.add_(same_bt, alpha=EXCLUDED)
            if self._kept is not None:
                self._kept.append(tile_bt)
            yield columns, tile_bt


def last_copies(ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """For each position of `ids_B` the position of the last equal id, and how many equal ids end there (else 0)."""
    B = len(ids_B)
    sorted_B, order_B = ids_B.sort(stable=True)
    ends_B = torch.ones_like(sorted_B, dtype=torch.bool)
    ends_B[:-1] = sorted_B[1:] != sorted_B[:-1]
    if ids_B.device.type == "cpu" and ends_B.all():  # no copies, the usual case; on a GPU the host would have to wait
        return torch.arange(B), torch.ones_like(ids_B)
    end_B = torch.where(ends_B, torch.arange(B, device=ids_B.device), B)
    end_B = end_B.flip(0).cummin(0).values.flip(0)
    last_B = torch.empty_like(ids_B).index_copy_(0, order_B, order_B[end_B])
    copies_B = torch.zeros_like(ids_B).index_add_(0, last_B, torch.ones_like(ids_B))
    return last_B, copies_B


def log_g(logits: Logits, diagonal_b: Tensor) -> tuple[Tensor, Tensor]:
    """log g and the mean exponent of each anchor, [b] each.

    g_i = 1/(B-1) sum_{j: id_j != id_i} exp(h_ij); log g_i is -inf where no j is left. The second result is
    sum_j h_ij exp(h_ij) / sum_j exp(h_ij), since tau d_tau g = -g times it.
    """
    # An online log-sum-exp of the logits: the largest so far, the sum of exponentials relative to it, and that sum
    # weighted by the logits.
    largest_b = torch.full_like(diagonal_b, -math.inf)
    total_b = torch.zeros_like(diagonal_b)
    weighted_b = torch.zeros_like(diagonal_b)
    for _, tile_bt in logits:
        new_largest_b = torch.maximum(largest_b, tile_bt.amax(1))
        exp_bt = (tile_bt - new_largest_b[:, None]).exp2_()
        shrink_b = (largest_b - new_largest_b).exp2()
        total_b = total_b * shrink_b + exp_bt.sum(1)
        weighted_b = weighted_b * shrink_b + exp_bt.mul_(tile_bt).sum(1)
        largest_b = new_largest_b
    own_b = diagonal_b / logits.tau_b
    nobody_b = largest_b < EXCLUDED / 1e3  # transposed() may have scaled it by up to TAU_MIN / TAU_MAX
    log_g_b = largest_b / LOG2_E - own_b + total_b.log() - math.log(len(logits.items_Bd) - 1)
    mean_h_b = weighted_b / total_b / LOG2_E - own_b
    return log_g_b.masked_fill(nobody_b, -math.inf), mean_h_b.masked_fill(nobody_b, 0.0)


def updated_log_u(log_u: Tensor, log_g: Tensor, gamma: float) -> Tensor:
    """log of (1-gamma) u + gamma g, elementwise; a sample that was never seen (log u = -inf) starts at g."""
    log_keep = math.log1p(-gamma) if gamma < 1 else -math.inf
    mixed = torch.logaddexp(log_u + log_keep, log_g + math.log(gamma))
    return torch.where(torch.isneginf(log_u), log_g, mixed)


def log_weight_denominator(log_u: Tensor, eps: float) -> Tensor:
    """log(eps + u), elementwise."""
    return torch.logaddexp(log_u, torch.full_like(log_u, math.log(eps)))


def feature_gradient(logits: Logits, own_bias_b: Tensor, other_bias_B: Tensor, other_tau_B: Tensor | None) -> Tensor:
    """sum_j W_ij item_j: the gradient w.r.t. the anchors' features but for the share of their own pair, [b, d].

    W_ij = exp(l_ij - own_bias_i) + exp(s_ij / other_tau_j - other_bias_j): anchor i against everybody, and
    everybody's anchors (of the other modality) against item i. other_tau_B is None where all tau are one.
    The biases hold the diagonal, log(eps + u) and the factors of the objective, so that each exponent is that of the
    final weight, which u bounds: nothing overflows at tau = 0.01.
    """
    own_bias_b1, other_bias_B = own_bias_b[:, None] * LOG2_E, other_bias_B * LOG2_E
    gradient_bd = torch.zeros_like(logits.scaled_anchors_bd)
    for columns, tile_bt in logits:
        weight_bt = (tile_bt - own_bias_b1).exp2_()
        if other_tau_B is None:
            other_bt = tile_bt - other_bias_B[columns]
        else:
            other_bt = (tile_bt * logits.tau_b[:, None]).div_(other_tau_B[columns]).sub_(other_bias_B[columns])
        weight_bt += other_bt.exp2_()
        gradient_bd.addmm_(weight_bt, logits.items_Bd[columns])
    return gradient_bd

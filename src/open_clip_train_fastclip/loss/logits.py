"""The b x B similarities of a step: walked through twice, in tiles of columns that never fill a b x B matrix.

Once for g, which the new u depends on, and once for the gradient, which needs everybody's new u. On a CPU a tile's
exponentials stay in the cache; a GPU takes few large tiles. Up to kept_elements() the logits themselves are kept
between the two walks (8 bytes an element for both directions; on one rank one matrix serves both); beyond, they are
computed again and memory is linear in B.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .functional import EXCLUDED, Places

KEPT_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}


class Logits:
    """l_ij = log2(e) similarity_ij / tau_i of b anchors with the B items of the other modality, tile by tile.

    A pair of features of one sample (the anchor's own among them) has EXCLUDED in the tile, or its places beside it.
    Iterating yields (slice of columns, tile [b, t], places or None); the tiles must not be changed.
    """

    def __init__(self, scaled_anchors_bd: Tensor, items_Bd: Tensor, first: int, last_B: Tensor | None):
        """scaled_anchors_bd: unit vectors times log2(e) / tau; first: place of the first anchor in the global batch.

        last_B: a number for each place that is equal for those of one sample; None where all samples are distinct.
        """
        self.scaled_anchors_bd, self.items_Bd, self.first, self.last_B = scaled_anchors_bd, items_Bd, first, last_B
        b, B, device = len(scaled_anchors_bd), len(items_Bd), items_Bd.device.type
        kind = device if device in TILE_ELEMENTS else "cpu"
        width = max(1, TILE_ELEMENTS[kind] // b)
        self._slices = [slice(start, min(start + width, B)) for start in range(0, B, width)]
        self._kept: list[Tensor] | None = [] if b * B <= KEPT_ELEMENTS[kind] else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Places | None]]:
        for number, columns in enumerate(self._slices):
            if self._kept is not None and number < len(self._kept):
                yield columns, self._kept[number], self._places(columns)
                continue
            tile_bt = self.scaled_anchors_bd @ self.items_Bd[columns].T
            self._exclude_on_cpu(tile_bt, columns)
            if self._kept is not None:
                self._kept.append(tile_bt)
            yield columns, tile_bt, self._places(columns)

    def _places(self, columns: slice) -> Places | None:
        """On a GPU, where the pass that reads the tile leaves the pairs out at no cost."""
        if self.last_B is None or not self.last_B.is_cuda:
            return None
        return self.last_B[self.first : self.first + len(self.scaled_anchors_bd)], self.last_B[columns]

    def _exclude_on_cpu(self, tile_bt: Tensor, columns: slice) -> None:
        if self.last_B is None:
            tile_bt.diagonal(self.first - columns.start).fill_(EXCLUDED)
        elif not self.last_B.is_cuda:
            # As floating point (exact up to 2^24): adding a float mask is faster than masked_fill with a bool one.
            places_B = self.last_B.to(tile_bt.dtype)
            places_b1 = places_B[self.first : self.first + len(tile_bt), None]
            same_bt = torch.eq(places_b1, places_B[columns], out=torch.empty_like(tile_bt))
            tile_bt.add_(same_bt, alpha=EXCLUDED)

"""This rank's pairs against the global batch: the sums that g is made of, and the gradients of the features."""

from contextlib import nullcontext

import torch
from torch import Tensor

from . import functional
from .functional import LOG2_E, Taus
from .logits import Logits
from .precision import tensor_cores

Sums = tuple[Tensor, ...]


class Contrast:
    """Image anchors against all texts and text anchors against all images, in one call of the loss.

    On one rank both are the same pairs, so one matrix of logits serves image anchors by rows and text anchors by
    columns: one product and half of the exponentials for the gradients fewer.
    """

    def __init__(self, features_B2d: Tensor, tau: Tensor, rank: int, world_size: int, last_B: Tensor | None):
        """features_B2d [B, 2, d]: image and text of every pair; tau: 0-d, or [B, 2] of individual temperatures."""
        B = len(features_B2d)
        b = B // world_size
        self.first, self.own = rank * b, slice(rank * b, rank * b + b)
        self.image_Bd, self.text_Bd = features_B2d.unbind(1)
        self.image_bd, self.text_bd = self.image_Bd[self.own], self.text_Bd[self.own]
        self.diagonal_b = torch.linalg.vecdot(self.image_bd, self.text_bd)
        self.tau_B2 = tau.to(features_B2d.dtype) if tau.dim() else None
        scale = LOG2_E / tau.to(features_B2d.dtype)
        scaled_b2d = features_B2d[self.own] * (scale[self.own, :, None] if tau.dim() else scale)
        image, text = scaled_b2d.unbind(1)
        self.image_logits = Logits(image, self.text_Bd, self.first, last_B)
        self.text_logits = Logits(text, self.image_Bd, self.first, last_B) if world_size > 1 else None

    def sums(self, with_mean: bool) -> tuple[Sums, Sums]:
        """functional.row_sums() of the image anchors and of the text anchors."""
        if self.text_logits is not None:
            return self._row_sums(self.image_logits, with_mean), self._row_sums(self.text_logits, with_mean)
        rows: Sums | None = None
        columns: list[Sums] = []
        for where, tile, places in self.image_logits:
            more = functional.row_sums(tile, places, with_mean)
            rows = more if rows is None else functional.merged(rows, more)
            columns.append(functional.column_sums(tile, places, with_mean, self._taus(where)))
        assert rows is not None
        return rows, columns[0] if len(columns) == 1 else tuple(map(torch.cat, zip(*columns, strict=True)))

    @staticmethod
    def _row_sums(logits: Logits, with_mean: bool) -> Sums:
        sums: Sums | None = None
        for _, tile, places in logits:
            more = functional.row_sums(tile, places, with_mean)
            sums = more if sums is None else functional.merged(sums, more)
        assert sums is not None
        return sums

    def _taus(self, columns: slice, modality: int = 0) -> Taus | None:
        """Individual temperatures of the local anchors of a modality and of the other modality in `columns`."""
        return None if self.tau_B2 is None else (self.tau_B2[self.own, modality], self.tau_B2[columns, 1 - modality])

    def gradients(self, bias_B2: Tensor, share_b1: Tensor, tf32: bool) -> Tensor:
        """Gradients of the local image and text features, [2, b, d]. bias_B2, share_b1: moves.weight_biases().

        tf32: whether the products with the weights may be in TF32; logits are what they were in sums().
        """
        both = torch.stack([self.text_bd, self.image_bd]).mul_(share_b1)
        image, text = both
        for where, tile, places in self.image_logits:
            weights = functional.pair_weights(tile, places, bias_B2[self.own, 0], bias_B2[where, 1], self._taus(where))
            with tensor_cores() if tf32 else nullcontext():
                image.addmm_(weights, self.text_Bd[where])
                if self.text_logits is None:
                    text[where].addmm_(weights.T, self.image_Bd)
        for where, tile, places in self.text_logits or ():
            weights = functional.pair_weights(
                tile, places, bias_B2[self.own, 1], bias_B2[where, 0], self._taus(where, 1)
            )
            with tensor_cores() if tf32 else nullcontext():
                text.addmm_(weights, self.image_Bd[where])
        return both

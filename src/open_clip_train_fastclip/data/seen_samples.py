"""Which samples of a large data set were seen: cheap to add to, small in a file."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 16  # samples that are stored together


class SeenSamples:
    """A set of numbers below num_samples. A block takes a byte a sample of memory, 8 KiB in a file, or nothing."""

    def __init__(self, num_samples: int, saved: Iterable[dict[str, Tensor]] = ()):
        """saved: what tensors() of other sets gave, which are joined here."""
        num_blocks = -(-num_samples // BLOCK)
        self.num_samples = num_samples
        self._blocks = np.zeros((num_blocks, BLOCK), bool)  # pages that nobody wrote to take no memory
        self._samples = self._blocks.reshape(-1)
        self._touched = np.zeros(num_blocks, bool)
        for tensors in saved:
            blocks = tensors["seen_blocks"].numpy()
            self._blocks[blocks] |= np.unpackbits(tensors["seen_bits"].numpy(), axis=1).view(bool)
            self._touched[blocks] = True

    def __len__(self) -> int:
        return int(self._samples.sum())

    def add(self, ids: np.ndarray) -> None:
        """Add ids [b] int64; a few microseconds."""
        self._samples[ids] = True
        self._touched[ids // BLOCK] = True

    def missing(self, ids: range) -> np.ndarray:
        """Those of consecutive ids that are not in the set, counted from the first of them."""
        return np.flatnonzero(~self._samples[ids.start : ids.stop])

    def tensors(self) -> dict[str, Tensor]:
        """The set as bits, in blocks; a copy."""
        blocks = np.flatnonzero(self._touched)
        bits = np.packbits(self._blocks[blocks], axis=1)
        return {"seen_blocks": torch.from_numpy(blocks), "seen_bits": torch.from_numpy(bits)}

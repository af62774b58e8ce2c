"""Seeds by epoch and by sample, and the state of this process's random generators.

OpenCLIP seeds once, at the start of the process, and its shuffle of samples not at all. Here order and augmentations
depend on seed, epoch, rank and place alone, so that a resumed run draws what an undisturbed one would have drawn.
"""

import random
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derived(*parts: int) -> int:
    """A number below 2**32 that depends on `parts` (seed, epoch, ...) alone."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_generators(*parts: int) -> None:
    """Seed the generators of torch, numpy and random in this process with what `parts` (seed, epoch, ...) give."""
    value = derived(*parts)
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def seed_augmentation(*parts: int) -> None:
    """Seed the generators that a transform of one sample may draw from: on the CPU alone, in microseconds."""
    value = int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little")
    torch.default_generator.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def seeded_iterator(dataloader: Iterable[Any], seed: int, epoch: int, rank: int) -> Iterator[Any]:
    """iter(dataloader) with an order, and with generators afterwards, that depend on the arguments alone.

    The generators are seeded twice, since making the iterator draws from them, and with persistent workers only the
    first one of a process does. The places of batches that were trained before a resume (None) are left out.
    """
    seed_generators(seed, epoch, rank, 0)
    batches = _undisturbing(iter(dataloader))
    first = next(batches, None)  # a sampler draws its seed here
    seed_generators(seed, epoch, rank, 1)
    if first is not None:
        yield first
    yield from batches


def _undisturbing(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches that are not None; making one, without workers, leaves the generators as the model's draws did."""
    while True:
        torch_state, numpy_state, state = torch.get_rng_state(), np.random.get_state(), random.getstate()
        batch = next((batch for batch in batches if batch is not None), None)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(state)
        if batch is None:
            return
        yield batch


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators (CPU and, if that is a GPU, `device`), numpy's and random's, as tensors."""
    numpy_state: Any = np.random.get_state()
    _, words, position, has_gauss, gauss = numpy_state
    _, numbers, normal = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*words.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "random": torch.tensor(numbers, dtype=torch.int64),
        "random_gauss": torch.tensor([] if normal is None else [normal], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what rng_state() gave, a GPU's state into `device`; it is left out where that is none."""
    torch.set_rng_state(states["torch"])
    *words, position, has_gauss = states["numpy"].tolist()
    numpy_words = np.array(words, dtype=np.uint32)
    np.random.set_state(("MT19937", numpy_words, position, has_gauss, states["numpy_gauss"].item()))
    normal = states["random_gauss"].tolist()
    random.setstate((3, tuple(states["random"].tolist()), normal[0] if normal else None))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)

"""Seeds by epoch, so that a resumed run draws the same order and augmentations as an undisturbed one.

OpenCLIP seeds once, at the start of the process, and its shuffle of samples not at all.
"""

import random

import numpy as np
import torch
from torch.utils.data import get_worker_info
from webdataset.utils import pytorch_worker_info


def _derived(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_generators(*parts: int) -> None:
    """Seed the generators of torch, numpy and random in this process with what `parts` (seed, epoch, ...) give."""
    value = _derived(*parts)
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def seeded_iterator(dataloader, seed: int, epoch: int, rank: int):
    """iter(dataloader) with an order, and with generators afterwards, that depend on the arguments alone.

    The generators are seeded twice, since making the iterator draws from them, and with persistent workers only the
    first one of a process does.
    """
    seed_generators(seed, epoch, rank, 0)
    iterator = iter(dataloader)
    first = next(iterator, None)  # a sampler draws its seed here
    seed_generators(seed, epoch, rank, 1)
    if first is not None:
        yield first
    yield from iterator


def seed_sample_order(dataloader, seed: int, shared_epoch) -> None:
    """Seed the draws of shards, the sample shuffle and the data workers of OpenCLIP's webdataset loader, in place.

    shared_epoch: OpenCLIP's counter, which its workers see. Call it before the loader is iterated.
    """
    stages = dataloader.pipeline[0].dataset.pipeline
    names = [getattr(getattr(stage, "f", None), "__name__", "") for stage in stages]
    number = names.index("_shuffle")
    shuffle = stages[number]
    if hasattr(stages[0], "worker_seed"):  # resampled shards: OpenCLIP adds the epoch to this seed

        def worker_seed():
            rank, _, worker, _ = pytorch_worker_info()
            return _derived(seed, rank, worker)

        stages[0].worker_seed = worker_seed

    def shuffled(samples):
        epoch = shared_epoch.get_value()
        rank, _, worker, _ = pytorch_worker_info()
        if get_worker_info() is not None:  # without workers the generators are the training's own
            seed_generators(seed, epoch, rank, 2 + worker)
        return shuffle.f(samples, *shuffle.args, **shuffle.kw, rng=random.Random(_derived(seed, epoch, rank, worker)))

    stages[number] = shuffled


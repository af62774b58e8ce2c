"""Seeds by epoch and by sample, so that a resumed run draws the same order and augmentations as an undisturbed one.

OpenCLIP seeds once, at the start of the process, and its shuffle of samples not at all.
"""

import random
from hashlib import blake2b

import numpy as np
import torch
from webdataset.utils import pytorch_worker_info


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
    """Seed the generators that a transform of one sample may draw from: on the CPU alone, in some 15 microseconds."""
    value = int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little")
    torch.default_generator.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def seeded_iterator(dataloader, seed: int, epoch: int, rank: int):
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


def _undisturbing(batches):
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


def seed_sample_order(dataloader, seed: int, shared_epoch) -> None:
    """Seed the draws of shards and the sample shuffle of OpenCLIP's webdataset loader, in place.

    shared_epoch: OpenCLIP's counter, which its workers see. Call it before the loader is iterated.
    """
    stages = dataloader.pipeline[0].dataset.pipeline
    names = [getattr(getattr(stage, "f", None), "__name__", "") for stage in stages]
    number = names.index("_shuffle")
    shuffle = stages[number]
    if hasattr(stages[0], "worker_seed"):  # resampled shards: OpenCLIP adds the epoch to this seed

        def worker_seed():
            rank, _, worker, _ = pytorch_worker_info()
            return derived(seed, rank, worker)

        stages[0].worker_seed = worker_seed

    def shuffled(samples):
        rank, _, worker, _ = pytorch_worker_info()
        rng = random.Random(derived(seed, shared_epoch.get_value(), rank, worker))
        return shuffle.f(samples, *shuffle.args, **shuffle.kw, rng=rng)

    stages[number] = shuffled

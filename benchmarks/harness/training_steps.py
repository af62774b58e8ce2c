"""Training steps as the ordinary command line makes them, of several losses in turn in one process."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import cycle, islice
from typing import Any
from unittest.mock import patch

import open_clip_train.data
import open_clip_train.main
import open_clip_train.train
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from open_clip_train_fastclip.openclip.hooks import Run
from open_clip_train_fastclip.openclip.patches import applied

from .processes import existing_group
from .timing import synchronize

DISTINCT = 256  # pairs that are made; a longer epoch has them again, under other ids
KEPT_BATCHES = 4  # on the device


class ReadySamples(Dataset):
    """Stands in for OpenCLIP's SyntheticDataset: random images and captions, transformed and tokenised beforehand."""

    def __init__(self, transform=None, image_size=(224, 224), caption="", dataset_size=100, tokenizer=None):
        generator = torch.Generator().manual_seed(0)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        made, self.size = min(DISTINCT, dataset_size), dataset_size
        self.images = torch.randn(made, 3, height, width, generator=generator)
        self.texts = tokenizer([f"picture number {i}" for i in range(made)])

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.images[index % len(self.images)], self.texts[index % len(self.texts)]


class KeptBatches:
    """Batches of a loader's samples in their order, made once and kept on the device: no copy hides the steps."""

    def __init__(self, loader: Any, device: str):
        """loader: a DataLoader with num_batches."""
        self.num_batches = loader.num_batches
        size, dataset = loader.batch_size, loader.dataset
        self.batches = [
            self._moved(default_collate([dataset[i] for i in range(first, first + size)]), device)
            for first in range(0, min(KEPT_BATCHES, self.num_batches) * size, size)
        ]

    @staticmethod
    def _moved(batch: list[Any], device: str) -> list[Any]:
        images, texts, *ids = batch  # ids come from the CPU in every run
        return [images.to(device), texts.to(device), *ids]

    def __iter__(self) -> Iterator[list[Any]]:
        return islice(cycle(self.batches), self.num_batches)


class Trainer:
    """What the command line has made at its first epoch; its loss may be replaced by one that watches."""

    def __init__(self, called: Callable[..., None], args: tuple, kwargs: dict):
        self.called, self.kwargs = called, kwargs
        self.model, self.data, self.loss, _, *self.rest = args
        self.optimizer: torch.optim.Optimizer = self.rest[0]

    def train(self, epoch: int) -> None:
        """One epoch by OpenCLIP's loop."""
        self.called(self.model, self.data, self.loss, epoch, *self.rest, **self.kwargs)

    def keep_batches(self, device: str) -> None:
        """Take the place of the loader: its first batches, on the device, again and again."""
        loader = self.data["train"].dataloader.dataloader  # under the bar: the one whose errors are agreed on
        loader.dataloader = KeptBatches(loader.dataloader, device)


class _SetUp(Exception):
    """Leaves main() when it is about to train."""


def set_up(argv: list[str]) -> Trainer:
    """Run the command line, with synthetic data, up to its first epoch."""
    stock, captured = open_clip_train.train.train_one_epoch, {}

    @functools.wraps(stock)
    def train_one_epoch(*args, **kwargs):
        if captured:
            return stock(*args, **kwargs)
        captured.update(args=args, kwargs=kwargs, called=open_clip_train.main.train_one_epoch)
        raise _SetUp

    replaced = [
        (open_clip_train.main, "train_one_epoch", train_one_epoch),
        (open_clip_train.main, "setup_logging", lambda log_file, level: logging.getLogger().setLevel(logging.ERROR)),
        (open_clip_train.data, "SyntheticDataset", ReadySamples),
    ]
    with ExitStack() as stack:
        for module, name, replacement in replaced:
            stack.enter_context(patch.object(module, name, replacement))
        stack.enter_context(existing_group())
        stack.enter_context(applied(Run()))
        with suppress(_SetUp):
            open_clip_train.main.main(argv)
    return Trainer(captured["called"], captured["args"], captured["kwargs"])


def alternate_epochs(
    trainers: dict[str, Trainer], rounds: int, device: str, barrier: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of the epochs of each loss, one a round, there and back again in the next, after a first to warm up."""
    times, order = {name: [] for name in trainers}, list(trainers)
    for epoch in range(rounds + 1):
        for name in order:
            barrier()
            synchronize(device)
            start = time.perf_counter()
            trainers[name].train(epoch)
            synchronize(device)
            barrier()
            if epoch:
                times[name].append(time.perf_counter() - start)
            trainers[name].optimizer.zero_grad()  # or all losses' gradients are in memory at once
        order.reverse()
    return times


class RecordedLoss:
    """A loop's loss that keeps its values, on the device: to read them in a step would wait for it."""

    def __init__(self, loss: Callable[..., dict[str, Tensor]]):
        self.loss = loss
        self.values: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = self.loss(*args, **kwargs)
        self.values.append(sum(losses.values()).detach())
        return losses

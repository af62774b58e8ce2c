"""Rows of a table, or synthetic data, with their numbers as sample ids, from wherever in the epoch the run stands."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler
from webdataset.utils import pytorch_worker_info

from ..errors import UserError, named_line
from .identity import DataIdentity
from .position import DataPosition, SeenSamples, WorkerPosition
from .rng import seed_augmentation
from .stream import MAX_CAPTION_BYTES, SharedEpoch


def attach_row_ids(dataloader: Any, seed: int, shared_epoch: SharedEpoch) -> tuple[Any, DataPosition]:
    """A DataLoader of rows (image, text), made to yield (images, texts, ids [b] int64, []), and what keeps track.

    The rows of a table have `images` (paths) and `captions`. shared_epoch is set before each epoch; seed and it seed
    the augmentations. The loader's own sampler decides the order, so the batches are the same. The result has the
    loader's num_samples and num_batches, and raises UserError that names the row and the file of an image that cannot
    be read.
    """
    order = RowOrder(dataloader.sampler, dataloader.batch_size, seed)
    numbered: Any = DataLoader(
        _NumberedRows(dataloader.dataset, seed, shared_epoch),
        batch_size=dataloader.batch_size,
        sampler=order,
        num_workers=dataloader.num_workers,
        pin_memory=dataloader.pin_memory,
        drop_last=dataloader.drop_last,
    )
    numbered.num_samples, numbered.num_batches = dataloader.num_samples, dataloader.num_batches
    return numbered, DataPosition(order, len(dataloader.dataset), dataloader.batch_size, dataloader.num_workers)


def rows_identity(rows: Any) -> DataIdentity:
    """Names a table by its images' file names and its captions in order; synthetic data by their number."""
    if not hasattr(rows, "captions"):
        return DataIdentity.of_synthetic_rows(len(rows))
    pairs = zip(rows.images, rows.captions, strict=True)
    return DataIdentity.of_table((os.path.basename(str(image)), str(caption)) for image, caption in pairs)


class RowOrder(Sampler[int]):
    """A sampler's order; its first epoch can begin inside."""

    in_order, partial_epoch = True, True

    def __init__(self, sampler: Any, batch_size: int, seed: int):
        self.sampler, self.batch_size, self.seed = sampler, batch_size, seed
        self.skip = 0  # rows that were trained before
        self.rest: list[int] | None = None  # in place of the sampler's

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows: Iterable[int] = self.sampler if self.rest is None else self.rest
        skip = self.skip
        self.skip, self.rest = 0, None
        for number, row in enumerate(rows):
            if number >= skip:
                yield row

    def resume(self, epoch: int, batches: int, workers: list[WorkerPosition], start: int) -> None:
        """See position.Source."""
        self.skip = batches * self.batch_size

    def resume_remaining(self, epoch: int, first: int, num_batches: int, seen: SeenSamples) -> None:
        """See position.Source."""
        rank, world_size, _, _ = pytorch_worker_info()
        unseen = np.random.default_rng((self.seed, epoch, first)).permutation(seen.missing(range(seen.num_samples)))
        self.rest = unseen[rank::world_size][: (num_batches - first) * self.batch_size].tolist()


class _NumberedRows(Dataset[tuple[Any, ...]]):
    def __init__(self, rows: Any, seed: int, shared_epoch: SharedEpoch):
        self.rows, self.seed, self.shared_epoch = rows, seed, shared_epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        where = f"row {row + 1} of --train-data"
        captions = getattr(self.rows, "captions", None)
        if captions and len(str(captions[row]).encode()) > MAX_CAPTION_BYTES:
            raise UserError(f"{where} has a caption of more than {MAX_CAPTION_BYTES:,} bytes: shorten it")
        seed_augmentation(self.seed, self.shared_epoch.get_value(), row)
        try:
            return *self.rows[row], row, ()
        except UserError:  # which names the row
            raise
        except Exception as error:  # what an image library or a transform raises for a bad image is not one kind
            files = getattr(self.rows, "images", None)
            where += f" ({files[row]})" if files else ""
            raise UserError(f"{where} cannot be read ({named_line(error)}): correct it or take it out") from None

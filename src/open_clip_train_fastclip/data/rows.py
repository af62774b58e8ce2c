"""Rows of a table, or synthetic data, with their numbers as sample ids, from wherever in the epoch the run stands."""

import hashlib
import json
import os
from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler
from webdataset.utils import pytorch_worker_info

from ..errors import UserError
from ..openclip.pipeline import MAX_CAPTION_BYTES, brief
from .position import DataPosition, WorkerPosition
from .rng import seed_augmentation
from .seen_samples import SeenSamples


def attach_row_ids(dataloader: DataLoader, seed: int, shared_epoch) -> tuple[DataLoader, DataPosition]:
    """OpenCLIP's loader of a table or of synthetic data, made to yield (images, texts, ids [b] int64, []).

    shared_epoch: OpenCLIP's counter, set before each epoch; seed and it seed the augmentations. OpenCLIP's sampler
    decides the order, so the batches are the same. The loader raises UserError that names the row and the file of an
    image that cannot be read.
    """
    order = RowOrder(dataloader.sampler, dataloader.batch_size, seed)
    numbered = DataLoader(
        _NumberedRows(dataloader.dataset, seed, shared_epoch),
        batch_size=dataloader.batch_size,
        sampler=order,
        num_workers=dataloader.num_workers,
        pin_memory=dataloader.pin_memory,
        drop_last=dataloader.drop_last,
    )
    numbered.num_samples, numbered.num_batches = dataloader.num_samples, dataloader.num_batches
    return numbered, DataPosition(order, len(dataloader.dataset), dataloader.batch_size, dataloader.num_workers)


def rows_hash(rows: Dataset) -> str:
    """Names the rows of a table by their images' file names and captions in order; synthetic data by their number."""
    if not hasattr(rows, "captions"):
        return f"rows:{len(rows)}"
    digest = hashlib.sha256()
    for image, caption in zip(rows.images, rows.captions, strict=True):
        digest.update(json.dumps([os.path.basename(str(image)), str(caption)]).encode())
    return digest.hexdigest()


class RowOrder(Sampler):
    """OpenCLIP's sampler, of which the first epoch may be gone on with."""

    in_order, partial_epoch = True, True

    def __init__(self, sampler: Sampler, batch_size: int, seed: int):
        self.sampler, self.batch_size, self.seed = sampler, batch_size, seed
        self.skip = 0  # rows that were trained before
        self.rest: list[int] | None = None  # in place of the sampler's

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows, skip = self.sampler if self.rest is None else self.rest, self.skip
        self.skip, self.rest = 0, None
        for number, row in enumerate(rows):
            if number >= skip:
                yield row

    def go_on(self, epoch: int, batches: int, workers: list[WorkerPosition], start: int) -> None:
        """See data_position.Source."""
        self.skip = batches * self.batch_size

    def go_on_with_rest(self, epoch: int, first: int, num_batches: int, seen: SeenSamples) -> None:
        """See data_position.Source."""
        rank, world_size, _, _ = pytorch_worker_info()
        unseen = np.random.default_rng((self.seed, epoch, first)).permutation(seen.missing(range(seen.num_samples)))
        self.rest = unseen[rank::world_size][: (num_batches - first) * self.batch_size].tolist()


class _NumberedRows(Dataset):
    def __init__(self, rows: Dataset, seed: int, shared_epoch):
        self.rows, self.seed, self.shared_epoch = rows, seed, shared_epoch

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int):
        where = f"row {row + 1} of --train-data"
        captions = getattr(self.rows, "captions", None)
        if captions and len(str(captions[row])) > MAX_CAPTION_BYTES:
            raise UserError(f"{where} has a caption of more than {MAX_CAPTION_BYTES} characters: shorten it")
        seed_augmentation(self.seed, self.shared_epoch.get_value(), row)
        try:
            return *self.rows[row], row, ()
        except Exception as error:  # what an image library or a transform raises for a bad image is not one kind
            files = getattr(self.rows, "images", None)
            where += f" ({files[row]})" if files else ""
            raise UserError(f"{where} cannot be read ({brief(error)}): correct it or take it out") from None

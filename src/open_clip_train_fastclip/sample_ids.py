"""A dense, stable id for every sample that a training loader yields: its batches become (images, texts, ids).

The id of a sample in a shard is the shard's first id (shard_sizes.ShardManifest) plus the sample's ordinal in the
tar, counted before anything is filtered or shuffled. The id of a row of a table is its number. All of OpenCLIP's
stages stay, in their order.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator

import open_clip_train.data as openclip_data
from torch.utils.data import DataLoader, Dataset
from webdataset.filters import FilterFunction
from webdataset.utils import pytorch_worker_info

from .errors import UserError
from .shard_sizes import ShardManifest

ID = "__id__"  # webdataset leaves entries alone that begin with __
STAGES = (  # of OpenCLIP's loader, after those that deal out the shards
    "tarfile_to_samples_nothrow", "_shuffle", "_select", "_decode", "_rename", "_map_dict", "_to_tuple", "_batched",
)  # fmt: skip


def attach_webdataset_ids(
    dataloader, manifest: ShardManifest | None, sample_id: str = "position", num_samples: int | None = None
) -> None:
    """Make OpenCLIP's webdataset loader yield (images, texts, ids [b] int64). Call it before the loader is iterated.

    sample_id: "position" (needs the manifest), or "json-key": the number under "key" in the sample's json, or else
    the sample's own key; these must be below num_samples.

    A sample that cannot be decoded is skipped with a warning and its id stays unused; an error while a shard is read
    ends that shard with a warning. The loader raises UserError for an id that does not fit, and for a worker whose
    shards do not fill one batch, which OpenCLIP would read again and again without end.
    """
    stages = dataloader.pipeline[0].dataset.pipeline
    names = tuple(_stage_name(stage) for stage in stages[-len(STAGES) :])
    if names != STAGES:
        raise UserError(
            f"the installed OpenCLIP reads shards in the stages {', '.join(names)}, which this package does not know: "
            "install 'open_clip_torch[training]>=3.3,<4'"
        )
    read, _, _, decode, _, transform, to_tuple, batch = stages[-len(STAGES) :]
    with_id = FilterFunction(to_tuple.f, *to_tuple.args, ID, **to_tuple.kw)
    replacements = {
        decode: functools.partial(_skip_broken, decode),
        transform: functools.partial(_skip_broken, transform),
        batch: functools.partial(_batches, batch),
    }
    if sample_id == "position":
        _require_known(stages[0].urls, manifest)
        replacements |= {read: functools.partial(_read_numbered, manifest), to_tuple: with_id}
    else:
        replacements[to_tuple] = lambda samples: with_id(_numbered_by_key(samples, num_samples))
    stages[:] = [replacements.get(stage, stage) for stage in stages]


def attach_row_ids(dataloader: DataLoader) -> DataLoader:
    """OpenCLIP's loader of a table or of synthetic data, made to yield (images, texts, ids [b] int64).

    The sampler is the same object, so the batches are the same. The loader raises UserError that names the row and
    the file of an image that cannot be read.
    """
    numbered = DataLoader(
        _NumberedRows(dataloader.dataset),
        batch_size=dataloader.batch_size,
        sampler=dataloader.sampler,
        num_workers=dataloader.num_workers,
        pin_memory=dataloader.pin_memory,
        drop_last=dataloader.drop_last,
    )
    numbered.num_samples, numbered.num_batches = dataloader.num_samples, dataloader.num_batches
    return numbered


def rows_hash(rows: Dataset) -> str:
    """Names the rows of a table by their images' file names and captions in order; synthetic data by their number."""
    if not hasattr(rows, "captions"):
        return f"rows:{len(rows)}"
    digest = hashlib.sha256()
    for image, caption in zip(rows.images, rows.captions, strict=True):
        digest.update(json.dumps([os.path.basename(str(image)), str(caption)]).encode())
    return digest.hexdigest()


class _NumberedRows(Dataset):
    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int):
        try:
            return *self.rows[row], row
        except Exception as error:  # what an image library or a transform raises for a bad image is not one kind
            files = getattr(self.rows, "images", None)
            where = f" ({files[row]})" if files else ""
            raise UserError(
                f"row {row + 1} of --train-data{where} cannot be read ({_brief(error)}): correct it or take it out"
            ) from None


def _stage_name(stage) -> str:
    function = getattr(stage, "f", stage)
    return getattr(function, "__name__", type(function).__name__)


def _brief(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _require_known(urls: Iterable[str], manifest: ShardManifest) -> None:
    unknown = set(urls) - set(manifest.urls)
    if unknown:
        raise UserError(f"shard {min(unknown)} is read but not in the manifest: name the shards without variables")


def _read_numbered(manifest: ShardManifest, shards: Iterable[dict]) -> Iterator[dict]:
    """OpenCLIP's reading stage, one shard at a time, with each sample's id."""
    counts = dict(zip(manifest.urls, manifest.counts, strict=True))
    for shard in shards:
        url = shard["url"]

        def end_shard(error, url=url):
            # what follows an unreadable file may be counted wrongly, and a wrong id is worse than none
            logging.warning(f"shard {url}: reading failed ({error!r}); the rest of this shard is left out")
            return False

        for ordinal, sample in enumerate(openclip_data.tarfile_to_samples_nothrow(iter([shard]), handler=end_shard)):
            if ordinal >= counts[url]:
                raise UserError(
                    f"shard {url}, sample {sample['__key__']}: the shard holds more than the {counts[url]} samples "
                    "recorded for it: correct or remove its sizes.json or *_stats.json, or raise --samples-per-shard "
                    "for a remote shard"
                )
            sample[ID] = manifest.offsets[url] + ordinal
            yield sample


def _numbered_by_key(samples: Iterable[dict], num_samples: int) -> Iterator[dict]:
    for sample in samples:
        where = f"shard {sample['__url__']}, sample {sample['__key__']}"
        metadata = sample.get("json")
        has_key = isinstance(metadata, dict) and "key" in metadata
        key = str(metadata["key"] if has_key else os.path.basename(sample["__key__"]))
        if not key.isdecimal():
            raise UserError(f"{where}: its key {key!r} is no number: use --sample-id position")
        if int(key) >= num_samples:
            raise UserError(
                f"{where}: its key {int(key)} does not fit a table of {num_samples} samples: raise --data-size above "
                "the largest key, or use --sample-id position"
            )
        sample[ID] = int(key)
        yield sample


def _skip_broken(stage: FilterFunction, samples: Iterable[dict]) -> Iterator[dict]:
    """A stage with a handler that knows which sample it was that failed."""
    current = {}

    def watched():
        for sample in samples:
            current.update(url=sample["__url__"], key=sample["__key__"])
            yield sample

    def skip(error):
        logging.warning(f"shard {current['url']}, sample {current['key']}: skipped, not decodable ({_brief(error)})")
        return True

    return stage.f(watched(), *stage.args, **{**stage.kw, "handler": skip})


def _batches(batch: Callable, samples: Iterable[tuple]) -> Iterator[list]:
    """The batches of one pass over a worker's shards, of which there must be one."""
    used = batched = 0

    def counted():
        nonlocal used
        for sample in samples:
            used += 1
            yield sample

    for images_texts_ids in batch(counted()):
        batched += 1
        yield images_texts_ids
    if not batched:
        rank, _, worker, workers = pytorch_worker_info()
        raise UserError(
            f"worker {worker + 1} of {workers} on rank {rank} finds {used} usable samples in its shards, less than one "
            "batch: lower --batch-size or --workers, or look for warnings about shards and samples above"
        )

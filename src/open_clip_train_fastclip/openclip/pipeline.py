"""A dense, stable id for every sample that a training loader yields: its batches become (images, texts, ids).

The id of a sample in a shard is the shard's first id (shard_sizes.ShardManifest) plus the sample's ordinal in the
tar, counted before anything is filtered or shuffled. All of OpenCLIP's stages stay, in their order. Rows of a table
are in table_rows.py.
"""

import functools
import logging
import os
from collections.abc import Iterable, Iterator

import open_clip_train.data as openclip_data
from webdataset.filters import FilterFunction

from ..data.manifest import ShardManifest
from ..data.position import DataPosition
from ..data.stream import ID, ORDINAL, SampleStream
from ..errors import UserError

MAX_CAPTION_BYTES = 16 << 10  # a tokenizer may take hours over one word of a megabyte
STAGES = (  # of OpenCLIP's loader, after those that deal out the shards
    "tarfile_to_samples_nothrow", "_shuffle", "_select", "_decode", "_rename", "_map_dict", "_to_tuple", "_batched",
)  # fmt: skip


def attach_webdataset_ids(
    dataloader, manifest: ShardManifest | None, sample_id: str, num_samples: int, seed: int, shared_epoch
) -> DataPosition:
    """Make OpenCLIP's webdataset loader yield (images, texts, ids [b] int64, position); what keeps track of these.

    sample_id: "position" (needs the manifest), or "json-key": the number under "key" in the sample's json, or else
    the sample's own key. num_samples: the ids are below it. seed and shared_epoch, OpenCLIP's counter, seed the
    augmentations. Call it before the loader is iterated.

    A sample that cannot be decoded is skipped with a warning and its id stays unused; an error while a shard is read
    ends that shard with a warning. The loader raises UserError for an id that does not fit, and for a worker whose
    shards do not fill one batch, which OpenCLIP would read again and again without end.
    """
    loader = dataloader.pipeline[0]
    stages = loader.dataset.pipeline
    names = tuple(_stage_name(stage) for stage in stages[-len(STAGES) :])
    if names != STAGES:
        raise UserError(
            f"the installed OpenCLIP reads shards in the stages {', '.join(names)}, which this package does not know: "
            "install 'open_clip_torch[training]>=3.3,<4'"
        )
    read, _, select, decode, _, transform, to_tuple, batch = stages[-len(STAGES) :]
    by_position = sample_id == "position"
    if by_position:
        _require_known(stages[0].urls, manifest)
    read_shard = functools.partial(_read_numbered, manifest) if by_position else _read_shard
    stream = SampleStream(
        stages[:2], read_shard, batch, manifest if by_position else None, seed, shared_epoch, loader.num_workers
    )
    with_id = FilterFunction(to_tuple.f, *to_tuple.args, ID, ORDINAL, **to_tuple.kw)
    replacements = {
        read: stream.read,
        select: lambda samples: _with_short_captions(select(stream.leave_shuffle(samples))),
        decode: functools.partial(_skip_broken, decode),
        transform: functools.partial(_skip_broken, transform),
        to_tuple: with_id if by_position else lambda samples: with_id(_numbered_by_key(samples, num_samples)),
        batch: stream.batches,
    }
    stages[:] = [replacements.get(stage, stage) for stage in stages]
    return DataPosition(stream, num_samples, batch.args[0], loader.num_workers)


def _stage_name(stage) -> str:
    function = getattr(stage, "f", stage)
    return getattr(function, "__name__", type(function).__name__)


def brief(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _require_known(urls: Iterable[str], manifest: ShardManifest) -> None:
    unknown = set(urls) - set(manifest.urls)
    if unknown:
        raise UserError(f"shard {min(unknown)} is read but not in the manifest: name the shards without variables")


def _read_shard(shard: dict, **kwargs) -> Iterator[dict]:
    """OpenCLIP's reading stage for one shard, since over several it joins the end of one and the start of the next."""
    return openclip_data.tarfile_to_samples_nothrow(iter([shard]), **kwargs)


def _read_numbered(manifest: ShardManifest, shard: dict) -> Iterator[dict]:
    """The samples of a shard with their ids."""
    url = shard["url"]
    ids = manifest.ids[url]

    def end_shard(error):
        # what follows an unreadable file may be counted wrongly, and a wrong id is worse than none
        logging.warning(f"shard {url}: reading failed ({error!r}); the rest of this shard is left out")
        return False

    for ordinal, sample in enumerate(_read_shard(shard, handler=end_shard)):
        if ordinal >= len(ids):
            raise UserError(
                f"shard {url}, sample {sample['__key__']}: the shard holds more than the {len(ids)} samples recorded "
                "for it: correct or remove its sizes.json or *_stats.json, or raise --samples-per-shard for a remote "
                "shard"
            )
        sample[ID] = ids[ordinal]
        yield sample


def _with_short_captions(samples: Iterable[dict]) -> Iterator[dict]:
    for sample in samples:
        size = len(sample["txt"])
        if size > MAX_CAPTION_BYTES:
            logging.warning(
                f"shard {sample['__url__']}, sample {sample['__key__']}: skipped, its caption has {size:,} bytes, the "
                f"limit is {MAX_CAPTION_BYTES:,}"
            )
        else:
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
        logging.warning(f"shard {current['url']}, sample {current['key']}: skipped, not decodable ({brief(error)})")
        return True

    return stage.f(watched(), *stage.args, **{**stage.kw, "handler": skip})

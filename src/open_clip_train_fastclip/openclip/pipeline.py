"""OpenCLIP's training loader, stage by stage: each sample gets an id, and what is drawn by chance a seed.

The id of a sample in a shard is the shard's first id (data.manifest) plus the sample's ordinal in the tar, counted
before anything is filtered or shuffled. All of OpenCLIP's stages stay, in their order. Rows of a table are in
data.rows.
"""

import argparse
import functools
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import open_clip_train.data as openclip_data
from open_clip_train.data import DataInfo, SharedEpoch, get_dataset_size
from webdataset.filters import FilterFunction
from webdataset.filters import map as mapped
from webdataset.utils import pytorch_worker_info

from ..data.decoding import decode_sample, without_needless
from ..data.identity import DataIdentity
from ..data.manifest import ShardManifest, read_manifest
from ..data.position import DataPosition
from ..data.rng import derived
from ..data.rows import attach_row_ids, rows_identity
from ..data.shard_list import check_shards, check_shards_for_workers
from ..data.stream import ID, MAX_CAPTION_BYTES, ORDINAL, Sample, SampleStream
from ..errors import UserError, named_line
from ..ranks import agree
from ..training.signals import ignore_signals
from . import run_args

STAGES = (  # of OpenCLIP's loader, after those that deal out the shards
    "tarfile_to_samples_nothrow", "_shuffle", "_select", "_decode", "_rename", "_map_dict", "_to_tuple", "_batched",
)  # fmt: skip
INSTALL = "install 'open_clip_torch[training]>=3.3,<4'"


# -------------------------------------------------------------------- the shards and their sizes


def ids_are_positions(args: argparse.Namespace) -> bool:
    """Whether a sample is known by its place in the data; OpenCLIP's own losses do not need its number."""
    return args.sample_id == "position" or not run_args.is_fastclip(args)


def manifest_of(train_data: str, **options: Any) -> ShardManifest:
    """data.manifest.read_manifest() with the files of a tar grouped to samples as OpenCLIP's loader groups them."""
    return read_manifest(train_data, openclip_data.group_by_keys_nothrow, **options)


def read_shard_sizes(args: argparse.Namespace) -> ShardManifest | None:
    """Shard sizes where the run needs them: for the ids, and for --train-num-samples if it is not given (collective).

    Sets args.train_num_samples. Raises UserError for shards that are missing, broken, or too few for the workers.
    """
    by_position = run_args.is_resumable(args) and ids_are_positions(args)
    # OpenCLIP's own losses keep OpenCLIP's count where it has one
    uncounted = args.train_num_samples is None and (run_args.is_fastclip(args) or not _counted(args.train_data))
    manifest = None
    if by_position or uncounted:
        manifest = manifest_of(
            args.train_data,
            samples_per_shard=args.samples_per_shard,
            cache_dir=args.logs if run_args.logs_are_written(args) else None,
            progress=args.rank == 0,
        )
        num_shards = len(manifest.listed)
        if uncounted:
            args.train_num_samples = manifest.num_listed_samples
    else:
        num_shards = len(agree(check_shards, args.train_data))
    agree(check_shards_for_workers, num_shards, args.workers, args.world_size, args.dataset_resampled)
    return manifest


def _counted(train_data: str) -> bool:
    """Whether OpenCLIP finds the size of the data set in its sizes.json or __len__."""
    try:
        return bool(get_dataset_size(train_data)[0])
    except (KeyError, ValueError, SyntaxError, TypeError, OSError):  # it lacks a shard, or is no table
        return False


# -------------------------------------------------------------------- the loader


@dataclass(frozen=True)
class TrainingData:
    """A loader of (images, texts, ids, positions), and which data it loads."""

    dataloader: Any
    position: DataPosition
    num_samples: int  # the ids are below it
    identity: DataIdentity


def with_ids(train: DataInfo, args: argparse.Namespace, manifest: ShardManifest | None, epoch: int) -> TrainingData:
    """OpenCLIP's training data, whose first epoch will be `epoch`, with ids, seeded; its workers ignore signals."""
    dataloader = train.dataloader
    if train.shared_epoch is None:  # rows
        rows = dataloader.dataset
        train.shared_epoch = SharedEpoch(epoch)
        dataloader, position = attach_row_ids(dataloader, args.seed, train.shared_epoch)
        dataloader.worker_init_fn = ignore_signals
        return TrainingData(dataloader, position, len(rows), rows_identity(rows))
    if not ids_are_positions(args):
        manifest, num_samples, identity = None, args.data_size, DataIdentity.of_json_keys(args.data_size)
    else:
        assert manifest is not None  # read_shard_sizes() has made it
        num_samples, identity = manifest.num_samples, manifest.identity
    position = rebuild(dataloader, manifest, num_samples, args.seed, train.shared_epoch)
    dataloader.pipeline[0].worker_init_fn = ignore_signals
    return TrainingData(dataloader, position, num_samples, identity)


def rebuild(
    dataloader: Any, manifest: ShardManifest | None, num_samples: int, seed: int, shared_epoch: SharedEpoch
) -> DataPosition:
    """Make OpenCLIP's webdataset loader yield (images, texts, ids [b] int64, position); what keeps track of these.

    The ids are below num_samples: positions in the shards of the manifest or, without one, the number under "key" in
    the sample's json, or else the sample's own key. seed and shared_epoch, OpenCLIP's counter, seed the draws of
    shards, the shuffle of samples and the augmentations. Call it before the loader is iterated.

    Only image, caption and, for such ids, the json are decoded. A sample that cannot be decoded is skipped with a
    warning and its id stays unused; an error while a shard is read ends that shard with a warning. The loader raises
    UserError for an id that does not fit, and for a worker whose shards do not fill one batch, which OpenCLIP would
    read again and again without end.
    """
    loader = dataloader.pipeline[0]
    stages = loader.dataset.pipeline
    names = tuple(_stage_name(stage) for stage in stages[-len(STAGES) :])
    if names != STAGES:
        raise UserError(
            f"the installed OpenCLIP reads shards in the stages {', '.join(names)}, unknown to this package: {INSTALL}"
        )
    seed_order(stages, seed, shared_epoch)
    read, _, select, _, _, transform, to_tuple, batch = stages[-len(STAGES) :]
    read_shard: Callable[[Sample], Iterator[Sample]] = _read_shard
    if manifest is not None:
        _require_known(stages[0].urls, manifest)
        read_shard = functools.partial(_read_numbered, manifest)
    stream = SampleStream(stages[:2], read_shard, batch, manifest, seed, shared_epoch, loader.num_workers)
    with_id = FilterFunction(to_tuple.f, *to_tuple.args, ID, ORDINAL, **to_tuple.kw)
    replacements = {
        read: stream.read,
        select: lambda samples: _with_short_captions(select(stream.leave_shuffle(samples))),
        transform: functools.partial(_skip_broken, transform),
        to_tuple: with_id if manifest is not None else lambda samples: with_id(_numbered_by_key(samples, num_samples)),
        batch: stream.batches,
    }
    stages[:] = [replacements.get(stage, stage) for stage in stages]
    decode_only_needed(stages, shuffled=True, with_json=manifest is None)
    return DataPosition(stream, num_samples, batch.args[0], loader.num_workers)


def decode_only_needed(stages: list[Any], shuffled: bool, with_json: bool = False) -> None:
    """Make a loader's stages decode image and caption (with_json: and json) alone and open nothing else, in place.

    shuffled: the stages shuffle samples, as those of training do.
    """
    place = STAGES.index("_decode") - len(STAGES)
    if _stage_name(stages[place]) != "_decode":
        raise UserError(f"the installed OpenCLIP decodes samples in another stage than {place}: {INSTALL}")
    decode = mapped(functools.partial(decode_sample, with_json=with_json))
    stages[place] = functools.partial(_skip_broken, decode)
    if shuffled:
        shuffle = STAGES.index("_shuffle") - len(STAGES)
        stages.insert(shuffle, functools.partial(without_needless, with_json=with_json))


def seed_order(stages: list[Any], seed: int, shared_epoch: SharedEpoch) -> None:
    """Seed the draws of shards and the shuffle of samples among a loader's stages, in place."""
    if hasattr(stages[0], "worker_seed"):  # resampled shards: OpenCLIP adds the epoch to this seed
        stages[0].worker_seed = lambda: derived(seed, *_rank_and_worker())
    place = STAGES.index("_shuffle") - len(STAGES)
    stages[place] = functools.partial(_shuffled, stages[place], seed, shared_epoch)


def _rank_and_worker() -> tuple[int, int]:
    rank, _, worker, _ = pytorch_worker_info()
    return rank, worker


def _stage_name(stage: Any) -> str:
    function = getattr(stage, "f", stage)
    return str(getattr(function, "__name__", type(function).__name__))


def _require_known(urls: Iterable[str], manifest: ShardManifest) -> None:
    unknown = set(urls) - set(manifest.urls)
    if unknown:
        raise UserError(f"shard {min(unknown)} is read but not in the manifest: name the shards without variables")


def _read_shard(shard: Sample, **kwargs: Any) -> Iterator[Sample]:
    """OpenCLIP's reading stage for one shard, since over several it joins the end of one and the start of the next."""
    samples: Iterator[Sample] = openclip_data.tarfile_to_samples_nothrow(iter([shard]), **kwargs)
    return samples


def _read_numbered(manifest: ShardManifest, shard: Sample) -> Iterator[Sample]:
    """The samples of a shard with their ids."""
    url = shard["url"]
    ids = manifest.ids[url]

    def end_shard(error: Exception) -> bool:
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


def _shuffled(
    shuffle: FilterFunction, seed: int, shared_epoch: SharedEpoch, samples: Iterable[Sample]
) -> Iterator[Sample]:
    rng = random.Random(derived(seed, shared_epoch.get_value(), *_rank_and_worker()))
    shuffled: Iterator[Sample] = shuffle.f(samples, *shuffle.args, **shuffle.kw, rng=rng)
    return shuffled


def _with_short_captions(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        size = len(sample["txt"])
        if size > MAX_CAPTION_BYTES:
            logging.warning(
                f"shard {sample['__url__']}, sample {sample['__key__']}: skipped, its caption has {size:,} bytes, the "
                f"limit is {MAX_CAPTION_BYTES:,}"
            )
        else:
            yield sample


def _numbered_by_key(samples: Iterable[Sample], num_samples: int) -> Iterator[Sample]:
    for sample in samples:
        where = f"shard {sample['__url__']}, sample {sample['__key__']}"
        metadata = sample.get("json")
        own_key = os.path.basename(sample["__key__"])
        key = str(metadata.get("key", own_key) if isinstance(metadata, dict) else own_key)
        if not key.isdecimal():
            raise UserError(f"{where}: its key {key!r} is no number: use --sample-id position")
        if int(key) >= num_samples:
            raise UserError(
                f"{where}: its key {int(key)} does not fit a table of {num_samples} samples: raise --data-size above "
                "the largest key, or use --sample-id position"
            )
        sample[ID] = int(key)
        yield sample


def _skip_broken(stage: FilterFunction, samples: Iterable[Sample]) -> Iterator[Sample]:
    """A stage with a handler that knows which sample it was that failed."""
    current: dict[str, str] = {}

    def watched() -> Iterator[Sample]:
        for sample in samples:
            current.update(url=sample["__url__"], key=sample["__key__"])
            yield sample

    def skip(error: Exception) -> bool:
        where = f"shard {current['url']}, sample {current['key']}"
        logging.warning(f"{where}: skipped, not decodable ({named_line(error)})")
        return True

    passed: Iterator[Sample] = stage.f(watched(), *stage.args, **{**stage.kw, "handler": skip})
    return passed

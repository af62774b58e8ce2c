"""OpenCLIP's training loader, stage by stage: each sample gets an id, and what is drawn by chance a seed.

The id of a sample in a shard is the shard's first id (data.manifest) plus the sample's ordinal in the tar, counted
before anything is filtered or shuffled. All of OpenCLIP's stages stay, in their order. Rows of a table are in
data.rows.
"""

import argparse
import functools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import open_clip_train.data as openclip_data
from open_clip_train.data import DataInfo, SharedEpoch, get_dataset_size
from webdataset.filters import FilterFunction
from webdataset.utils import pytorch_worker_info

from ..data.agreed import AgreedLoader
from ..data.identity import DataIdentity
from ..data.manifest import ShardManifest, read_manifest
from ..data.position import DataPosition
from ..data.rng import derived
from ..data.rows import attach_row_ids, rows_identity
from ..data.shard_list import check_shards, check_shards_for_workers
from ..data.stream import ID, MAX_CAPTION_BYTES, ORDINAL, Sample, SampleStream
from ..data.tally import Tally, name_of
from ..errors import UserError
from ..ranks import agree
from ..training.signals import ignore_signals
from . import run_args
from .usable import agreed, checked, decode_needed, read_shard, select_usable, skip_broken, stage_name

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
    if by_position or uncounted or args.skip_broken_shards:
        manifest = manifest_of(
            args.train_data,
            skip_broken=args.skip_broken_shards,
            samples_per_shard=args.samples_per_shard,
            cache_dir=args.logs if run_args.logs_are_written(args) else None,
            progress=args.rank == 0,
        )
        num_shards = len(manifest.listed)
        if args.train_num_samples is None:
            args.train_num_samples = manifest.num_listed_samples
    else:
        num_shards = len(check_shards(args.train_data))
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

    dataloader: AgreedLoader
    position: DataPosition
    num_samples: int  # the ids are below it
    identity: DataIdentity
    visits_per_epoch: float = 1.0  # of a sample, on average; 1 too where the number of samples is not known


def with_ids(train: DataInfo, args: argparse.Namespace, manifest: ShardManifest | None, epoch: int) -> TrainingData:
    """OpenCLIP's training data, whose first epoch will be `epoch`, with ids, seeded; its workers ignore signals."""
    dataloader = train.dataloader
    if train.shared_epoch is None:  # rows
        rows = dataloader.dataset
        train.shared_epoch = SharedEpoch(epoch)
        dataloader, position = attach_row_ids(dataloader, args.seed, train.shared_epoch)
        dataloader.worker_init_fn = ignore_signals
        return TrainingData(agreed(dataloader, args), position, len(rows), rows_identity(rows))
    per_epoch, visits = args.train_num_samples or get_dataset_size(args.train_data)[0], 1.0
    if not ids_are_positions(args):
        manifest, num_samples, identity = None, args.data_size, DataIdentity.of_json_keys(args.data_size)
    else:
        assert manifest is not None  # read_shard_sizes() has made it
        num_samples, identity = manifest.num_samples, manifest.identity
        if not manifest.bounded:
            visits = per_epoch / num_samples
    tally = Tally(args.workers)
    position = rebuild(dataloader, manifest, num_samples, args.seed, train.shared_epoch, tally, per_epoch)
    dataloader.pipeline[0].worker_init_fn = ignore_signals
    loader = checked(dataloader, tally, args, train.shared_epoch)
    return TrainingData(loader, position, num_samples, identity, visits)


def rebuild(
    dataloader: Any,
    manifest: ShardManifest | None,
    num_samples: int,
    seed: int,
    shared_epoch: SharedEpoch,
    tally: Tally | None = None,
    per_epoch: int | None = None,
) -> DataPosition:
    """Make OpenCLIP's webdataset loader yield (images, texts, ids [b] int64, position); what keeps track of these.

    The ids are below num_samples: positions in the shards of the manifest or, without one, the number under "key" in
    the sample's json, or else the sample's own key. seed and shared_epoch, OpenCLIP's counter, seed the draws of
    shards, the shuffle of samples and the augmentations. tally: counts what is left out. per_epoch: as in DataPosition.
    Call it before the loader is iterated.

    Only image, caption and, for such ids, the json are decoded. A sample that cannot be decoded is skipped with a
    warning and its id stays unused; an error while a shard is read ends that shard with a warning. The loader raises
    UserError for an id that does not fit, and for a worker whose shards do not fill one batch, which OpenCLIP would
    read again and again without end.
    """
    loader = dataloader.pipeline[0]
    stages, tally = loader.dataset.pipeline, tally or Tally(loader.num_workers)
    _require_stages(stages)
    with_json = manifest is None
    seed_order(stages, seed, shared_epoch)
    read, _, select, decode, _, transform, to_tuple, batch = stages[-len(STAGES) :]
    reader: Callable[[Sample], Iterator[Sample]] = functools.partial(read_shard, tally, {}, with_json)
    if manifest is not None:
        _require_known(stages[0].urls, manifest)
        reader = functools.partial(_read_numbered, manifest, tally)
    stream = SampleStream(stages[:2], reader, batch, manifest, seed, shared_epoch, loader.num_workers, tally)
    short_captions = functools.partial(_with_short_captions, tally)
    with_id = FilterFunction(to_tuple.f, *to_tuple.args, ID, ORDINAL, **to_tuple.kw)
    replacements = {
        read: stream.read,
        select: lambda samples: short_captions(select_usable(select, tally, stream.leave_shuffle(samples))),
        decode: decode_needed(tally, with_json),
        transform: functools.partial(skip_broken, transform, tally),
        to_tuple: with_id if manifest is not None else lambda samples: with_id(_numbered_by_key(samples, num_samples)),
        batch: stream.batches,
    }
    stages[:] = [replacements.get(stage, stage) for stage in stages]
    return DataPosition(stream, num_samples, batch.args[0], loader.num_workers, per_epoch)


def _require_stages(stages: list[Any]) -> None:
    names = tuple(stage_name(stage) for stage in stages[-len(STAGES) :])
    if names != STAGES:
        raise UserError(
            f"the installed OpenCLIP reads shards in the stages {', '.join(names)}, unknown to this package: {INSTALL}"
        )


def seed_order(stages: list[Any], seed: int, shared_epoch: SharedEpoch) -> None:
    """Seed the draws of shards and the shuffle of samples among a loader's stages, in place."""
    if hasattr(stages[0], "worker_seed"):  # resampled shards: OpenCLIP adds the epoch to this seed
        stages[0].worker_seed = lambda: derived(seed, *_rank_and_worker())
    place = STAGES.index("_shuffle") - len(STAGES)
    stages[place] = functools.partial(_shuffled, stages[place], seed, shared_epoch)


def _rank_and_worker() -> tuple[int, int]:
    rank, _, worker, _ = pytorch_worker_info()
    return rank, worker


def _require_known(urls: Iterable[str], manifest: ShardManifest) -> None:
    unknown = set(urls) - set(manifest.urls)
    if unknown:
        raise UserError(f"shard {min(unknown)} is read but not in the manifest: name the shards without variables")


def _read_numbered(manifest: ShardManifest, tally: Tally, shard: Sample) -> Iterator[Sample]:
    """The samples of a shard with their ids.

    Reading ends at what cannot be read: what follows may be counted wrongly, and a wrong id is worse than none.
    """
    url = shard["url"]
    ids = manifest.ids[url]
    for number, sample in enumerate(read_shard(tally, manifest.recorded, False, shard)):
        if number == len(ids):
            raise UserError(
                f"shard {url}, sample {sample['__key__']}: the shard holds more than the {len(ids)} samples recorded "
                "for it: correct or remove its sizes.json, *_stats.json or fastclip_sizes.json, or raise "
                "--samples-per-shard for a remote shard"
            )
        sample[ID] = ids[number]
        yield sample


def _shuffled(
    shuffle: FilterFunction, seed: int, shared_epoch: SharedEpoch, samples: Iterable[Sample]
) -> Iterator[Sample]:
    rng = random.Random(derived(seed, shared_epoch.get_value(), *_rank_and_worker()))
    shuffled: Iterator[Sample] = shuffle.f(samples, *shuffle.args, **shuffle.kw, rng=rng)
    return shuffled


def _with_short_captions(tally: Tally, samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        size = len(sample["txt"])
        if size > MAX_CAPTION_BYTES:
            limit = f"{MAX_CAPTION_BYTES:,}"
            tally.warn(f"{name_of(sample)}: skipped, its caption has {size:,} bytes, the limit is {limit}")
            tally.left_out(f"with a caption of more than {limit} bytes", name_of(sample))
        else:
            yield sample


def _numbered_by_key(samples: Iterable[Sample], num_samples: int) -> Iterator[Sample]:
    for sample in samples:
        where = name_of(sample)
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

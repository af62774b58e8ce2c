"""The training data of a run: how large its shards are, and OpenCLIP's loader with ids."""

from dataclasses import dataclass

from open_clip_train.data import DataInfo, SharedEpoch, get_dataset_size

from ..checkpoint.table import json_key_hash
from ..data.manifest import ShardManifest, read_manifest
from ..data.position import DataPosition
from ..data.rng import seed_sample_order
from ..data.rows import attach_row_ids, rows_hash
from ..data.shard_list import check_shards, check_shards_for_workers
from ..errors import agree
from ..training.signals import ignore_signals
from . import checks
from .pipeline import attach_webdataset_ids


@dataclass
class TrainingData:
    """A loader of (images, texts, ids, positions), and which data it loads."""

    dataloader: object
    position: DataPosition
    num_samples: int  # the ids are below it
    hash: str  # of the data that the ids belong to
    text: str | None  # ShardManifest.text, if the ids are positions in shards


def ids_are_positions(args) -> bool:
    """Whether a sample is known by its place in the data; OpenCLIP's own losses do not need its number."""
    return args.sample_id == "position" or not checks.is_fastclip(args)


def read_shard_sizes(args) -> ShardManifest | None:
    """Shard sizes where the run needs them: for the ids, and for --train-num-samples if it is not given (collective).

    Sets args.train_num_samples. Raises UserError for shards that are missing, broken, or too few for the workers.
    """
    by_position = checks.is_resumable(args) and ids_are_positions(args)
    # OpenCLIP's own losses keep OpenCLIP's count where it has one
    uncounted = args.train_num_samples is None and (checks.is_fastclip(args) or not _counted(args.train_data))
    manifest = None
    if by_position or uncounted:
        manifest = read_manifest(
            args.train_data,
            samples_per_shard=args.samples_per_shard,
            cache_dir=args.logs if checks.logs_are_written(args) else None,
            progress=args.rank == 0,
        )
        num_shards = len(manifest.listed)
    else:
        num_shards = len(agree(check_shards, args.train_data))
    agree(check_shards_for_workers, num_shards, args.workers, args.world_size, args.dataset_resampled)
    if uncounted:
        args.train_num_samples = manifest.num_listed_samples
    return manifest


def _counted(train_data: str) -> bool:
    """Whether OpenCLIP finds the size of the data set in its sizes.json or __len__."""
    try:
        return bool(get_dataset_size(train_data)[0])
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, OSError):  # it lacks a shard, or is no table
        return False


def with_ids(train: DataInfo, args, manifest: ShardManifest | None, epoch: int) -> TrainingData:
    """OpenCLIP's training data, whose first epoch will be `epoch`, with ids, seeded and deaf to signals."""
    if train.shared_epoch is not None:  # shards
        if ids_are_positions(args):
            sample_id, num_samples, identity, text = "position", manifest.num_samples, manifest.hash, manifest.text
        else:
            sample_id, num_samples, text = "json-key", args.data_size, None
            identity = json_key_hash(num_samples)
        dataloader = train.dataloader
        position = attach_webdataset_ids(dataloader, manifest, sample_id, num_samples, args.seed, train.shared_epoch)
        seed_sample_order(dataloader, args.seed, train.shared_epoch)
        dataloader.pipeline[0].worker_init_fn = ignore_signals
    else:
        num_samples, identity, text = len(train.dataloader.dataset), rows_hash(train.dataloader.dataset), None
        train.shared_epoch = SharedEpoch(epoch)
        dataloader, position = attach_row_ids(train.dataloader, args.seed, train.shared_epoch)
        dataloader.worker_init_fn = ignore_signals
    return TrainingData(dataloader, position, num_samples, identity, text)

"""The training data of a run that can be saved inside an epoch: OpenCLIP's loader with ids, and what it reads."""

from dataclasses import dataclass

from open_clip_train.data import DataInfo, SharedEpoch

from . import checks
from .checkpoint import json_key_hash
from .data_position import DataPosition
from .sample_ids import attach_webdataset_ids
from .seeding import seed_sample_order
from .shard_sizes import ShardManifest
from .stopping import ignore_signals
from .table_rows import attach_row_ids, rows_hash


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

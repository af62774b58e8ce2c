"""OpenCLIP's stages that leave samples out, with a tally of them; the batches stay OpenCLIP's own."""

import argparse
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import open_clip_train.data as openclip_data
from open_clip_train.data import DataInfo
from webdataset import DataPipeline
from webdataset.filters import FilterFunction
from webdataset.filters import map as mapped
from webdataset.tariterators import group_by_keys

from ..data.agreed import AgreedLoader
from ..data.checked_loader import CheckedLoader, EvaluationLoader, no_evaluation
from ..data.decoding import decode_sample, needed_endings
from ..data.manifest import ShardManifest, read_all_sizes
from ..data.shard_list import some
from ..data.tally import Tally, name_of, why_unusable
from ..data.tar_files import shard_files
from ..errors import named_line
from ..ranks import agree, gather_objects, is_first_rank
from . import run_args

Samples = Iterable[dict[str, Any]]


def stage_name(stage: Any) -> str:
    """What a stage of OpenCLIP's loader is called."""
    function = getattr(stage, "f", stage)
    return str(getattr(function, "__name__", type(function).__name__))


# -------------------------------------------------------------------- the stages


def read_shard(
    tally: Tally, recorded: Mapping[str, int], with_json: bool, shard: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """OpenCLIP's reading stage for one shard, since over several it joins the end of one and the start of the next.

    recorded: how many samples a shard should hold, where that is known. with_json: read the samples' json, too.
    """
    return _read(openclip_data.group_by_keys_nothrow, tally, recorded, with_json, [shard])


def _read(
    group: Callable[..., Iterator[dict[str, Any]]],
    tally: Tally,
    recorded: Mapping[str, int],
    with_json: bool,
    shards: Samples,
) -> Iterator[dict[str, Any]]:
    """OpenCLIP's reading stage, over all shards."""

    def leave_out_file(error: Exception) -> bool:
        tally.warn(f"a file is left out ({named_line(error)})")
        return True

    return tally.grouped(group(shard_files(shards, needed_endings(with_json), tally), handler=leave_out_file), recorded)


def select_usable(select: FilterFunction, tally: Tally, samples: Samples) -> Iterator[Any]:
    """OpenCLIP's choice of samples with an image and a caption."""
    (is_usable,) = select.args
    for sample in samples:
        if is_usable(sample):
            yield sample
        else:
            tally.left_out(why_unusable(sample), name_of(sample))


def decode_needed(tally: Tally, with_json: bool = False) -> Callable[[Samples], Iterator[Any]]:
    """In place of OpenCLIP's decoding of all files by their endings: of image and caption, with_json: and json."""
    return functools.partial(skip_broken, mapped(functools.partial(decode_sample, with_json=with_json)), tally)


def skip_broken(stage: FilterFunction, tally: Tally, samples: Samples) -> Iterator[Any]:
    """A stage that gives a sample for each one, but for those that it cannot work on."""
    current: dict[str, Any] = {}
    reasons: list[str] = []

    def watched() -> Iterator[dict[str, Any]]:
        for sample in samples:
            leave_out()
            current.update(__url__=sample["__url__"], __key__=sample["__key__"])
            yield sample

    def skip(error: Exception) -> bool:
        reasons.append(named_line(error))
        return True

    def leave_out() -> None:
        """The sample before, if nothing has come of it."""
        if current:
            why = reasons.pop() if reasons else "left out"
            tally.warn(f"{name_of(current)}: skipped, not decodable ({why})")
            tally.left_out("not decodable", f"{name_of(current)} ({why})")

    for sample in stage.f(watched(), *stage.args, **{**stage.kw, "handler": skip}):
        current.clear()
        yield sample
    leave_out()


def _batches(batch: Any, tally: Tally, is_train: bool, samples: Iterable[Any]) -> Iterator[Any]:
    """OpenCLIP's batches of one pass; in training a worker that has none would read its shards without end."""
    tally.begin_pass()
    made = 0
    for contents in batch(tally.used(samples)):
        made += 1
        tally.publish()
        yield contents
    tally.publish()
    if is_train and not made:
        raise tally.too_few()


# -------------------------------------------------------------------- the loaders


def agreed(dataloader: Any, args: argparse.Namespace) -> AgreedLoader:
    """A training loader of rows."""
    return AgreedLoader(dataloader, args.workers, timedelta(seconds=args.dist_timeout))


def checked(dataloader: Any, tally: Tally, args: argparse.Namespace, shared_epoch: Any) -> CheckedLoader:
    """A training loader whose stages keep the tally."""
    timeout = timedelta(seconds=args.dist_timeout)
    return CheckedLoader(dataloader, args.workers, timeout, tally, args.max_unusable, shared_epoch.get_value)


def watch(
    data: dict[str, DataInfo], args: argparse.Namespace, manifest: ShardManifest | None, val_shards: list[str]
) -> None:
    """Let OpenCLIP's loaders of shards keep a tally, and those of training data raise errors on all ranks (collective).

    In place; training data that get ids have this from pipeline.with_ids(). val_shards: of --val-data, which are read.
    Raises UserError if evaluation data hold nothing usable.
    """
    train, evaluation = data.get("train"), data.get("val")
    if train is not None:
        if train.shared_epoch is not None and args.skip_broken_shards and manifest is not None:
            keep_shards(train.dataloader, manifest.listed, "--train-data")
        if not run_args.is_resumable(args):
            train.dataloader = _watched_training(train, args, manifest)
    if evaluation is not None and val_shards:
        keep_shards(evaluation.dataloader, val_shards, "--val-data")
        tally = watch_stages(evaluation.dataloader, {}, args.workers, is_train=False)
        agree(_require_usable, evaluation.dataloader, tally)
        evaluation.dataloader = EvaluationLoader(evaluation.dataloader, tally)


def _watched_training(train: DataInfo, args: argparse.Namespace, manifest: ShardManifest | None) -> AgreedLoader:
    if train.shared_epoch is None:
        return agreed(train.dataloader, args)
    recorded: Mapping[str, int] = {}  # what the epoch's length was made of
    if manifest is not None:
        recorded = manifest.recorded
    elif args.train_num_samples is None:
        shards = train.dataloader.pipeline[0].dataset.pipeline[0].urls
        recorded = gather_objects(agree(read_all_sizes, shards if is_first_rank() else []))[0]
    tally = watch_stages(train.dataloader, recorded, args.workers, is_train=True)
    return checked(train.dataloader, tally, args, train.shared_epoch)


def keep_shards(dataloader: Any, listed: Iterable[str], flag: str) -> None:
    """Let OpenCLIP's loader read only these of its shards, with the factors that it draws them by."""
    shards, kept = dataloader.pipeline[0].dataset.pipeline[0], set(listed)
    broken = [url for url in dict.fromkeys(shards.urls) if url not in kept]
    if broken and is_first_rank():
        logging.warning(f"--skip-broken-shards leaves out {len(broken):,} shards of {flag}: {some(broken)}")
    weights = getattr(shards, "weights", None)
    if weights is not None:
        shards.weights = [weight for url, weight in zip(shards.urls, weights, strict=True) if url in kept]
    shards.urls = [url for url in shards.urls if url in kept]


def watch_stages(dataloader: Any, recorded: Mapping[str, int], workers: int, is_train: bool) -> Tally:
    """Put stages that keep the returned tally in the place of an OpenCLIP loader's; recorded: as in read_shard()."""
    stages = dataloader.pipeline[0].dataset.pipeline
    tally = Tally(workers)
    watched: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
        "tarfile_to_samples_nothrow": lambda _: functools.partial(
            _read, openclip_data.group_by_keys_nothrow, tally, recorded, False
        ),
        "tarfile_samples": lambda _: functools.partial(_read, group_by_keys, tally, recorded, False),
        "_select": lambda stage: functools.partial(select_usable, stage, tally),
        "_decode": lambda _: decode_needed(tally),
        "_map_dict": lambda stage: functools.partial(skip_broken, stage, tally),
        "_batched": lambda stage: functools.partial(_batches, stage, tally, is_train),
    }
    stages[:] = [watched.get(stage_name(stage), lambda stage: stage)(stage) for stage in stages]
    return tally


def _require_usable(dataloader: Any, tally: Tally) -> None:
    if not is_first_rank():  # which alone evaluates
        return
    *stages, _ = dataloader.pipeline[0].dataset.pipeline
    tally.begin()
    tally.begin_pass()
    if next(iter(DataPipeline(*stages)), None) is None:
        tally.publish()
        raise no_evaluation(tally.total())

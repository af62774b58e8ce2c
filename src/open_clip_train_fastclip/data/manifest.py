"""How many samples each shard holds, and so where its sample ids begin: the shard manifest.

Sizes come from the first of these that knows a shard: sizes.json beside it, img2dataset's NNNNN_stats.json, an
earlier scan, a scan of the tar's headers (local shards), --samples-per-shard (remote ones).
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from webdataset.gopen import gopen

from ..errors import UserError
from ..ranks import agree, gather_objects, is_first_rank, rank_share
from .identity import DataIdentity
from .shard_list import THREADS, Problem, check_shards, local_path, shard_name, without_broken
from .tar_scan import MOST_SAMPLES, Group, ScanCache, Scanned, scan_shards


@dataclass(frozen=True)
class ShardManifest:
    """The shards of a data set and their sizes. A sample's id is offsets[its shard] + its ordinal in the tar."""

    listed: tuple[str, ...]  # urls as --train-data gives them, repetitions included
    urls: tuple[str, ...]  # each once, in order
    counts: tuple[int, ...]  # samples of each of urls; --samples-per-shard where that is all that is known
    bounded: frozenset[str] = frozenset()  # urls of which only --samples-per-shard is known

    @property
    def num_samples(self) -> int:
        """N: the ids are 0 .. N-1."""
        return sum(self.counts)

    @property
    def num_listed_samples(self) -> int:
        """Samples of one pass over the list, in which a repeated shard counts again."""
        count_of = dict(zip(self.urls, self.counts, strict=True))
        return sum(count_of[url] for url in self.listed)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Shard url -> the id of its first sample."""
        offsets, offset = {}, 0
        for url, count in zip(self.urls, self.counts, strict=True):
            offsets[url] = offset
            offset += count
        return offsets

    @cached_property
    def ids(self) -> dict[str, range]:
        """Shard url -> the ids of its samples."""
        sizes = zip(self.urls, self.counts, strict=True)
        return {url: range(self.offsets[url], self.offsets[url] + count) for url, count in sizes}

    @cached_property
    def recorded(self) -> dict[str, int]:
        """Shard url -> its samples, where they were counted."""
        sizes = zip(self.urls, self.counts, strict=True)
        return {url: count for url, count in sizes if url not in self.bounded}

    @cached_property
    def identity(self) -> DataIdentity:
        """Names the data set: file names and sizes of the shards in order."""
        return DataIdentity.of_shards(
            (shard_name(url), count) for url, count in zip(self.urls, self.counts, strict=True)
        )


def read_manifest(
    train_data: str,
    group: Group,
    *,
    skip_broken: bool = False,
    samples_per_shard: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ShardManifest:
    """The manifest of the shards that --train-data names; local shards are checked and, if need be, counted.

    group: the loader's function that makes samples of a tar's files, since these are what counts. skip_broken: leave
    out shards that cannot be read, instead of refusing them. A scan is cached beside the shards or, where nothing can
    be written there, in cache_dir. progress: show the scan on stderr. Collective: the ranks split the work, and a
    UserError of one is raised on all.
    """
    listed = check_shards(train_data, skip_broken=skip_broken)
    urls = list(dict.fromkeys(listed))
    cache = ScanCache(cache_dir)
    counts, bounded = _recorded_on_rank_0(urls, samples_per_shard, cache)
    missing = [url for url in urls if url not in counts]
    found = _gather(agree(_scan, rank_share(missing), group, progress))
    scans = {url: scanned for url, scanned in found.items() if isinstance(scanned, Scanned)}
    if scans and is_first_rank():
        cache.write({_path_of(url): scanned for url, scanned in scans.items()})
    problems = {url: problem for url, problem in found.items() if isinstance(problem, Problem)}
    listed = without_broken(listed, problems, skip_broken)
    counts |= {url: scanned.samples for url, scanned in scans.items()}
    urls = list(dict.fromkeys(listed))
    manifest = ShardManifest(tuple(listed), tuple(urls), tuple(counts[url] for url in urls), bounded)
    agree(_require_samples, manifest)
    return manifest


def read_all_sizes(urls: list[str]) -> dict[str, int]:
    """Shard url -> the size that a sizes.json beside it says, where there is one."""
    sizes = {place: _read_sizes(place) for place in dict.fromkeys(map(_sizes_place, urls)) if place}
    found = {url: sizes.get(_sizes_place(url) or "", {}).get(shard_name(url)) for url in urls}
    return {url: count for url, count in found.items() if count is not None}


def _recorded_on_rank_0(
    urls: list[str], samples_per_shard: int | None, cache: ScanCache
) -> tuple[dict[str, int], frozenset[str]]:
    """What rank 0 finds recorded, on every rank: one of them reading thousands of small files is enough."""
    nothing: tuple[dict[str, int], frozenset[str]] = {}, frozenset()
    found = [agree(lambda: _recorded(urls, samples_per_shard, cache) if is_first_rank() else nothing)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def _path_of(url: str) -> str:
    path = local_path(url)
    assert path is not None  # remote shards are not scanned
    return path


def _scan(urls: list[str], group: Group, progress: bool) -> dict[str, Scanned | Problem]:
    return dict(zip(urls, scan_shards(list(map(_path_of, urls)), group, progress), strict=True))


def _gather(scans: dict[str, Scanned | Problem]) -> dict[str, Scanned | Problem]:
    return {url: scanned for share in gather_objects(scans) for url, scanned in share.items()}


def _require_samples(manifest: ShardManifest) -> None:
    if manifest.num_samples == 0:
        raise UserError(f"the {len(manifest.urls)} shards hold no sample: correct --train-data or their sizes.json")


def _recorded(
    urls: list[str], samples_per_shard: int | None, cache: ScanCache
) -> tuple[dict[str, int], frozenset[str]]:
    """Sizes that need no scan, and the shards of which only --samples-per-shard is known.

    Local shards without a size are left out.
    """
    counts = read_all_sizes(urls)
    others = [url for url in urls if url not in counts]
    remote = frozenset(url for url in others if local_path(url) is None)
    for url in others if samples_per_shard is None else ():
        if url in remote:
            raise UserError(
                f"shard {url} is remote and of unknown size: add --samples-per-shard, the most samples that a shard "
                "holds, or put a sizes.json beside it"
            )

    def recorded(url: str) -> int | None:
        if url in remote:
            return samples_per_shard
        path = _path_of(url)
        count = _img2dataset_count(path)
        return cache.count(path) if count is None else count

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(others, pool.map(recorded, others), strict=True))
    return counts | {url: count for url, count in found.items() if count is not None}, remote


def _sizes_place(url: str) -> str | None:
    """Where a shard's sizes.json would be; None where the address does not tell."""
    path = local_path(url)
    if path is not None:
        return os.path.join(os.path.dirname(path), "sizes.json")
    if url.startswith("pipe:") or "?" in url:
        return None
    return url.rsplit("/", 1)[0] + "/sizes.json"


def _read_sizes(place: str) -> dict[str, int]:
    """OpenCLIP's sizes.json as {file name: samples}; empty if there is none."""
    try:
        with gopen(place) as stream:
            text = stream.read()
    except OSError:
        return {}
    try:
        return {name: _as_count(count) for name, count in json.loads(text).items()}
    except (ValueError, AttributeError):
        if local_path(place) is None:  # a server's page that says 'not found'
            return {}
        raise UserError(
            f'{place} is no table like {{"00000.tar": 9732}}: correct it, or remove it and the samples are counted'
        ) from None


def _img2dataset_count(path: str) -> int | None:
    try:
        stats = json.loads(Path(path.removesuffix(".tar") + "_stats.json").read_text())
        return _as_count(stats["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_count(value: Any) -> int:
    if not str(value).isdecimal() or int(value) > MOST_SAMPLES:
        raise ValueError(f"{value!r} is no number of samples")
    return int(value)

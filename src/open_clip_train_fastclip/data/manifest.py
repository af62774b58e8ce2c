"""How many samples each shard holds, and so where its sample ids begin: the shard manifest.

Sizes come from the first of these that knows a shard: sizes.json beside it, img2dataset's NNNNN_stats.json, an
earlier scan, a scan of the tar's headers (local shards), --samples-per-shard (remote ones).
`python -m open_clip_train_fastclip.shard_sizes TRAIN_DATA` does the scan before a run.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import open_clip_train.data as openclip_data
import torch.distributed as dist
from tqdm import tqdm
from webdataset.gopen import gopen

from ..errors import UserError, agree, gather_objects
from .scan_cache import MOST_SAMPLES, ScanCache, Scanned
from .shard_list import THREADS, check_shards, local_path, rank_share, shard_name

SECONDS_BETWEEN_LINES = 10  # of progress, where there is no terminal for a bar


@dataclass(frozen=True)
class ShardManifest:
    """The shards of a data set and their sizes. A sample's id is offsets[its shard] + its ordinal in the tar."""

    listed: tuple[str, ...]  # urls as --train-data gives them, repetitions included
    urls: tuple[str, ...]  # each once, in order
    counts: tuple[int, ...]  # samples of each of urls; --samples-per-shard where that is all that is known

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

    @property
    def text(self) -> str:
        """Names and sizes of the shards in order, as JSON, without folders: staging them changes nothing."""
        return json.dumps([[shard_name(url), count] for url, count in zip(self.urls, self.counts, strict=True)])

    @property
    def hash(self) -> str:
        """Names the data set: SHA-256 of `text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_manifest(
    train_data: str,
    *,
    samples_per_shard: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> ShardManifest:
    """The manifest of the shards that --train-data names; local shards are checked and, if need be, counted.

    A scan is cached beside the shards or, where nothing can be written there, in cache_dir. progress: show the scan
    on stderr. Collective: the ranks split the work, and a UserError of one is raised on all.
    """
    listed = agree(check_shards, train_data)
    urls = list(dict.fromkeys(listed))
    cache = ScanCache(cache_dir)
    counts = _recorded_on_rank_0(urls, samples_per_shard, cache)
    missing = [url for url in urls if url not in counts]
    scans = _gather(agree(_scan, rank_share(missing), progress))
    if scans and _is_rank_0():
        cache.write({local_path(url): scanned for url, scanned in scans.items()})
    counts |= {url: scanned.count for url, scanned in scans.items()}
    manifest = ShardManifest(tuple(listed), tuple(urls), tuple(counts[url] for url in urls))
    agree(_require_samples, manifest)
    return manifest


def scan_shard(path: str) -> Scanned:
    """Count a shard's samples by its tar headers, about 30 microseconds a file, grouped as OpenCLIP groups them."""
    stat = os.stat(path)
    try:
        with tarfile.open(path) as tar:
            count = sum(1 for _ in openclip_data.group_by_keys_nothrow(_files(tar)))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"shard {path} cannot be read to its end ({type(error).__name__}): make it again, or leave it out"
        ) from None
    return Scanned(count, stat.st_size, stat.st_mtime_ns)


def _files(tar: tarfile.TarFile) -> Iterator[dict]:
    """The files of a tar that webdataset passes on: regular ones whose names do not begin with __metadata__."""
    for member in tar:
        tar.members = []  # the list of what was read would take a kilobyte a file
        if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
            yield {"fname": member.name, "data": b"not read", "__url__": tar.name}


def _is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _recorded_on_rank_0(urls: list[str], samples_per_shard: int | None, cache: ScanCache) -> dict[str, int]:
    """What rank 0 finds recorded, on every rank: one of them reading thousands of small files is enough."""
    found = [agree(lambda: _recorded(urls, samples_per_shard, cache) if _is_rank_0() else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def _gather(scans: dict[str, Scanned]) -> dict[str, Scanned]:
    return {url: scanned for share in gather_objects(scans) for url, scanned in share.items()}


def _require_samples(manifest: ShardManifest) -> None:
    if manifest.num_samples == 0:
        raise UserError(f"the {len(manifest.urls)} shards hold no sample: correct --train-data or their sizes.json")


def _recorded(urls: list[str], samples_per_shard: int | None, cache: ScanCache) -> dict[str, int]:
    """Sizes that need no scan; local shards without one are left out."""
    sizes = {place: _read_sizes(place) for place in dict.fromkeys(map(_sizes_place, urls)) if place}

    def recorded(url):
        count, path = sizes.get(_sizes_place(url), {}).get(shard_name(url)), local_path(url)
        if count is None and path is None:
            return samples_per_shard
        if count is None:
            count = _img2dataset_count(path)
        return cache.count(path) if count is None else count

    with ThreadPoolExecutor(THREADS) as pool:
        counts = dict(zip(urls, pool.map(recorded, urls), strict=True))
    for url, count in counts.items():
        if count is None and local_path(url) is None:
            raise UserError(
                f"shard {url} is remote and of unknown size: add --samples-per-shard, the most samples that a shard "
                "holds, or put a sizes.json beside it"
            )
    return {url: count for url, count in counts.items() if count is not None}


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
    except (ValueError, AttributeError, RecursionError):
        if local_path(place) is None:  # a server's page that says 'not found'
            return {}
        raise UserError(
            f'{place} is no table like {{"00000.tar": 9732}}: correct it, or remove it and the samples are counted'
        ) from None


def _img2dataset_count(path: str) -> int | None:
    try:
        stats = json.loads(Path(path.removesuffix(".tar") + "_stats.json").read_text())
        return _as_count(stats["successes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _as_count(value) -> int:
    if not str(value).isdecimal() or int(value) > MOST_SAMPLES:
        raise ValueError(f"{value!r} is no number of samples")
    return int(value)


def _scan(urls: list[str], progress: bool) -> dict[str, Scanned]:
    with ThreadPoolExecutor(THREADS) as pool:
        scans = pool.map(scan_shard, map(local_path, urls))
        return dict(zip(urls, _shown(scans, len(urls)) if progress else scans, strict=True))


def _shown(scans: Iterable[Scanned], total: int) -> Iterator[Scanned]:
    """A bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(scans, "counting samples", total, unit=" shards")
        return
    last = time.monotonic()
    for done, scanned in enumerate(scans, 1):
        if done == total or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"counting samples: {done:,} of {total:,} shards", file=sys.stderr, flush=True)
        yield scanned


def main(argv: list[str] | None = None) -> int:
    """Scan shards before a run; returns the exit code: 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(description="Count the samples of shards before a run, and cache the counts.")
    parser.add_argument("train_data", help="as for --train-data: folder/{00000..00331}.tar, joined by ::")
    parser.add_argument("--logs", help="the run's log folder, where the counts go if the data folder is read-only")
    args = parser.parse_args(argv)
    try:
        manifest = read_manifest(args.train_data, cache_dir=args.logs, progress=True)
    except UserError as error:
        print(f"shard_sizes: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(manifest.urls):,} shards, {manifest.num_samples:,} samples")
    return 0

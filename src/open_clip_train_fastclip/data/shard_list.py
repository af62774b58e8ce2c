"""The shards that --train-data names: which they are, where they lie, whether they can be read, how many are needed."""

import os
import re
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlparse

from webdataset.gopen import gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls

from ..errors import UserError
from ..ranks import agree, gather_objects, rank_share

MOST_NAMED = 10  # shards in one line
THREADS = 16  # a network file system is slow to answer, but answers many at once
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")  # first bytes of gzip, bzip2 and xz, which the loader unpacks


def local_path(url: str) -> str | None:
    """The path of a shard that the loader opens as a file; None for one that it fetches."""
    url = str(rewrite_url(url))
    parts = urlparse(url)
    return {"": url, "file": parts.path}.get(parts.scheme)


def shard_name(url: str) -> str:
    """The file name of a shard, also inside an address or a command (`pipe:cat /data/00000.tar`)."""
    path = local_path(url)
    if path is not None:
        return os.path.basename(path)
    names = re.findall(r"[^/\s'\"?&=]+\.tar(?:\.\w+)?", url)
    return names[-1] if names else os.path.basename(url)


class Problem(NamedTuple):
    """Why a shard cannot be used, and the cure."""

    what: str
    cure: str


def expand_shards(data: str, flag: str = "--train-data") -> list[str]:
    """The shards that OpenCLIP makes of a flag's value (`{00000..00331}.tar`, `::`), in order, repetitions included."""
    try:
        urls: list[str] = expand_urls(data)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{flag} {data} cannot be expanded ({error}): write it as folder/{{00000..00331}}.tar"
        ) from None
    return urls


def check_shards(data: str, flag: str = "--train-data", skip_broken: bool = False) -> list[str]:
    """expand_shards(), of which local ones are opened: each must begin and end as a tar file does.

    Collective: the ranks split this work. Raises UserError that names the broken shards and the cure; skip_broken:
    leave them out instead.
    """
    urls = agree(expand_shards, data, flag)
    found = gather_objects(agree(_problems, rank_share(list(dict.fromkeys(urls)))))
    return without_broken(urls, {url: problem for share in found for url, problem in share.items()}, skip_broken)


def without_broken(urls: list[str], problems: Mapping[str, Problem], skip_broken: bool) -> list[str]:
    """The urls that have no problem. Raises UserError for the others or, with skip_broken, if all have one."""
    shards = list(dict.fromkeys(urls))
    broken = [problems[url] for url in shards if url in problems]
    if broken and (not skip_broken or len(broken) == len(shards)):
        what = some([problem.what for problem in broken], "; ")
        if len(broken) > 1:
            what = f"of {len(shards):,} shards, {len(broken):,} cannot be used: {what}"
        raise UserError(f"{what}: {broken[0].cure}, as --skip-broken-shards does", on_all_ranks=True)
    return [url for url in urls if url not in problems]


def some(names: list[str], separator: str = ", ", more: int = 0) -> str:
    """The first MOST_NAMED of names, and how many others there are; more: that are not among them."""
    more += max(0, len(names) - MOST_NAMED)
    return separator.join([*names[:MOST_NAMED], *([f"and {more:,} more"] if more else [])])


def _problems(urls: list[str]) -> dict[str, Problem]:
    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(urls, pool.map(_problem, urls), strict=True)
        return {url: problem for url, problem in found if problem is not None}


def check_shards_for_workers(num_shards: int, workers: int, world_size: int, resampled: bool) -> None:
    """Raise UserError, saying how many workers would fit, if a worker would be left without a shard.

    num_shards counts repetitions; with resampling every worker draws from all shards.
    """
    fitting = num_shards // world_size
    if resampled or fitting >= max(workers, 1):
        return
    if fitting == 0:
        raise UserError(
            f"{num_shards} shards are too few for {world_size} processes: use at most {num_shards}, "
            "make more and smaller shards, or add --dataset-resampled"
        )
    raise UserError(
        f"{num_shards} shards are too few for {workers} workers in each of {world_size} processes, "
        f"which need {workers * world_size}: use --workers {fitting}, more and smaller shards, or --dataset-resampled"
    )


def _problem(url: str) -> Problem | None:
    try:
        path = local_path(url)
    except ValueError as error:
        return Problem(f"shard {url} is no address ({error})", "correct it, or leave it out")
    if path is None:
        scheme = urlparse(rewrite_url(url)).scheme
        if scheme in gopen_schemes:
            return None
        return Problem(
            f"shard {url}: webdataset opens no {scheme}:// address",
            f"name a command, like pipe:aws s3 cp {url} -, or leave it out",
        )
    again = "download or make it again, or leave it out"
    try:
        with open(path, "rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            tail = file.read()
    except FileNotFoundError:
        return Problem(f"shard {path} does not exist", _how_to_name(path))
    except OSError as error:
        return Problem(
            f"shard {path} cannot be read ({error.strerror})", "see to its kind and permissions, or leave it out"
        )
    if head.startswith(COMPRESSED):
        return None
    if not _is_header(head) and not (size <= tarfile.RECORDSIZE and head == bytes(tarfile.BLOCKSIZE)):
        return Problem(f"shard {path} is no tar file", again)
    if size % tarfile.BLOCKSIZE or tail != bytes(2 * tarfile.BLOCKSIZE):
        return Problem(f"shard {path} is cut off, a complete tar ends with zeros", again)
    return None


def _how_to_name(path: str) -> str:
    if path.startswith("~"):
        return "~ is not expanded here, write the whole path, or leave it out"
    if re.search(r"[*?\[]", path):
        return "* ? and [] are not expanded here, write folder/{00000..00331}.tar, or leave it out"
    return "correct its name, or leave it out"


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True

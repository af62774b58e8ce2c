"""What the data workers of a rank meet in an epoch, counted: samples used and left out, shards not as recorded.

Each worker publishes its counts with every batch in memory that it shares with the training process.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing import Array, Value
from typing import Any

import torch.utils.data
from webdataset.utils import pytorch_worker_info

from ..errors import UserError, named_line
from .decoding import CAPTION, IMAGES
from .shard_list import MOST_NAMED, some
from .tar_files import ReadUrl

MOST_WARNINGS = 10  # of a worker about single samples and shards
MOST_REASONS = 20  # that are told apart
MOST_UNREADABLE = 10  # shards in a row
BARREN_SHARDS, BARREN_SAMPLES = 3, 1000  # both without one usable sample; one bad shard may be one of thousands
EMPTY_SHARDS = 100  # without one sample
MOST_SECONDS_TO_WAIT = 3
SLOT = 1 << 18  # bytes; the bounds above keep a worker's counts below it
ENCODING = "utf-8", "surrogatepass"  # of what is published: names of files may be no UTF-8
IMAGE = f"{', '.join(IMAGES[:-1])} or {IMAGES[-1]}"
CURE = (
    f"a sample is an image ({IMAGE}) and a caption ({CAPTION}), one behind the other in the tar, whose names are the "
    "same up to the first dot and have these endings behind it"
)


@dataclass
class Counts:
    """Of some workers in one epoch."""

    used: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # why: samples
    examples: dict[str, str] = field(default_factory=dict)  # why: one of them
    shards: int = 0  # that were read
    samples: int = 0  # in these
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)  # shard: samples in it, and recorded for it
    # shard: why its end could not be read, samples before that, and recorded for it
    broken: dict[str, tuple[str, int, int | None]] = field(default_factory=dict)
    lost: int = 0  # samples of broken shards, of which it is recorded how many they hold
    more_resized: int = 0  # beyond the MOST_NAMED that are named
    more_broken: int = 0

    @property
    def unused(self) -> int:
        """Samples that were left out."""
        return sum(self.left_out.values())

    def add(self, other: "Counts") -> None:
        """Count the other's, too."""
        self.used += other.used
        self.shards += other.shards
        self.samples += other.samples
        for why, samples in other.left_out.items():
            self.leave_out(why, other.examples[why], samples)
        self.resized |= other.resized
        self.broken |= other.broken
        self.more_resized += other.more_resized
        self.more_broken += other.more_broken
        self.lost += other.lost

    def leave_out(self, why: str, example: str, samples: int = 1) -> None:
        """Count samples that are not used."""
        if why not in self.left_out and len(self.left_out) >= MOST_REASONS:
            why = "for other reasons"
        self.left_out[why] = self.left_out.get(why, 0) + samples
        self.examples.setdefault(why, example)

    def reasons(self) -> str:
        """Why samples were left out, the most frequent reasons first, with one of them."""
        ordered = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        reasons = [f"{samples:,} {why}" for why, samples in ordered]
        return f"{some(reasons)}; for one, {self.examples[ordered[0][0]]}"

    @property
    def cure(self) -> str:
        """What to do about the samples that were left out."""
        return CURE if any(why.startswith("without ") for why in self.left_out) else "see to the data"

    def findings(self) -> list[str]:
        """What does not fit, a line each; losses() come first."""
        return [*self.losses(), *self.of_sizes()]

    def losses(self) -> list[str]:
        """Which samples are not used, a line each for those that were left out and those of broken shards."""
        if not self.left_out:
            return self.of_broken()
        looked_at = self.used + self.unused
        unused = f"{self.unused:,} of {looked_at:,} samples that were read were not used: {self.reasons()}"
        return [unused, *self.of_broken()]

    def of_sizes(self) -> list[str]:
        """Which shards have another size than recorded; a line, or none."""
        lines = []
        if self.resized:
            shards = [f"{name} ({samples:,} of {recorded:,})" for name, (samples, recorded) in self.resized.items()]
            lines.append(
                f"{len(shards) + self.more_resized:,} of the shards hold another number of samples than sizes.json, "
                "*_stats.json or an earlier count says, so the epoch has another length than the data: "
                f"{some(shards, more=self.more_resized)}"
            )
        return lines

    def of_broken(self) -> list[str]:
        """Which shards could not be read to their end; a line, or none."""
        if not self.broken:
            return []
        shards = [f"{name} ({_of(samples, recorded)}, {why})" for name, (why, samples, recorded) in self.broken.items()]
        lost = f", with which {self.lost:,} samples are lost" if self.lost else ""
        return [
            f"{len(shards) + self.more_broken:,} of the shards could not be read to their end{lost}: "
            f"{some(shards, more=self.more_broken)}"
        ]


def why_unusable(sample: dict[str, Any]) -> str:
    """What a sample lacks, and the endings of the files that it has."""
    endings = sorted(name for name in sample if not name.startswith("__"))
    missing = [] if CAPTION in sample else [CAPTION]
    missing += [] if any(ending in sample for ending in IMAGES) else [IMAGE]
    found = ", ".join(ending[:40] for ending in endings[:5]) or "no file"
    return f"without {' and without '.join(missing)} ({found} found)"


def name_of(sample: dict[str, Any]) -> str:
    """A sample's shard and key."""
    return f"shard {sample['__url__']}, sample {sample['__key__']}"


class Tally:
    """Counts of one rank's workers; begun anew with each epoch by the training process."""

    def __init__(self, num_workers: int):
        self._epoch = Value("q", 0)  # how often begin() was called
        self._slots: list[Any] = [Array("c", SLOT) for _ in range(max(1, num_workers))]
        self._counts, self._counted = Counts(), 0  # this worker's, and the epoch that they are of
        self._used_in_pass = 0
        self._through: list[ReadUrl] = []  # of which the last sample may still come
        self._unreadable = 0  # shards in a row
        self._failed: set[str] = set()  # shards of which nothing came when they were read last
        self._told: set[str] = set()  # shards that were counted as resized or broken
        self._warnings = 0

    # ---- in the training process

    def begin(self) -> None:
        """An epoch begins; before its loader is iterated."""
        self._epoch.value += 1

    def total(self) -> Counts:
        """The counts of this rank's workers in the running epoch."""
        total = Counts()
        for slot in self._slots:
            with slot.get_lock():
                published = slot.value
            epoch, counts = json.loads(published.decode(*ENCODING)) if published else (0, {})
            if epoch == self._epoch.value:
                total.add(Counts(**counts))
        return total

    # ---- in a worker

    def begin_pass(self) -> None:
        """A pass over the worker's shards begins."""
        self._used_in_pass = 0
        self._through = []
        if self._counted != self._epoch.value:
            self._counted, self._counts, self._told = self._epoch.value, Counts(), set()

    def used(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Count samples that come to be part of batches."""
        for sample in samples:
            self._counts.used += 1
            self._used_in_pass += 1
            yield sample

    def left_out(self, why: str, where: str) -> None:
        """Count a sample that is not used. Raises UserError if there is nothing else in many."""
        counts = self._counts
        counts.leave_out(_short(why), _short(where))
        if not counts.used and counts.shards >= BARREN_SHARDS and counts.unused >= BARREN_SAMPLES:
            raise self.too_few()

    def reading_failed(self, url: ReadUrl, error: Exception, files: int) -> None:
        """See tar_files.Watcher. Raises UserError if nothing came of many shards in a row."""
        command = re.search(r": exit (-?\d+) \(read\)", str(error))  # of a command that fetches, as webdataset says it
        why = f"its command ended with exit code {command[1]}" if command else _short(named_line(error))
        self.warn(f"shard {url}: reading failed ({why}); the rest of this shard is left out")
        url.failed = why
        if files:
            return
        self._failed.add(url)
        self._unreadable += 1
        if self._unreadable >= MOST_UNREADABLE:
            raise UserError(
                f"{MOST_UNREADABLE} shards in a row could not be read, the last of them {url} ({why}): "
                "see to the disk, the address or the network, and go on with --resume latest"
            )

    def seconds_to_wait(self, url: str) -> float | None:
        """See tar_files.Watcher; a shard that is not there at all is soon known, and costs no more waits."""
        return None if url in self._failed else min(1 + self._unreadable, MOST_SECONDS_TO_WAIT)

    def shard_through(self, url: ReadUrl) -> None:
        """See tar_files.Watcher. Raises UserError if there is no sample in many shards."""
        self._through.append(url)
        self._counts.shards += 1
        if not self._counts.samples and self._counts.shards >= EMPTY_SHARDS:
            raise self.too_few()

    def grouped(self, samples: Iterable[dict[str, Any]], recorded: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """Count the samples that are made of shard_files() and compare each shard's with those recorded for it.

        A sample comes once the next one begins, perhaps shards later: it ends the shards before its own.
        """
        for sample in samples:
            url = sample["__url__"]
            while self._through and self._through[0] is not url:
                self._end_shard(self._through.pop(0), recorded)
            url.samples += 1
            self._counts.samples += 1
            self._unreadable = 0
            yield sample
        while self._through:
            self._end_shard(self._through.pop(0), recorded)

    def _end_shard(self, url: ReadUrl, recorded: Mapping[str, int]) -> None:
        expected = recorded.get(url)
        if url.samples:
            self._failed.discard(url)
        if url.failed:
            if url not in self._told and expected is not None:
                self._counts.lost += max(0, expected - url.samples)
            self._count_shard(self._counts.broken, url, (url.failed, url.samples, expected))
        elif expected is not None and url.samples != expected:
            if url not in self._told:
                self.warn(f"shard {url}: it holds {url.samples:,} samples, and {expected:,} are recorded for it")
            self._count_shard(self._counts.resized, url, (url.samples, expected))

    def _count_shard(self, named: dict[str, Any], url: str, what: Any) -> None:
        if url in self._told:  # in an earlier pass of the epoch
            return
        self._told.add(url)
        if len(named) < MOST_NAMED:
            named[_short(url)] = what
        elif named is self._counts.resized:
            self._counts.more_resized += 1
        else:
            self._counts.more_broken += 1

    def publish(self) -> None:
        """Let the training process know."""
        worker = torch.utils.data.get_worker_info()
        slot = self._slots[0 if worker is None else worker.id]
        published = json.dumps([self._counted, asdict(self._counts)], ensure_ascii=False).encode(*ENCODING)
        with slot.get_lock():
            slot.value = published

    def warn(self, text: str) -> None:
        """A warning about one sample or shard; from the eleventh on the counts must do."""
        self._warnings += 1
        if self._warnings < MOST_WARNINGS:
            logging.warning(text)
        elif self._warnings == MOST_WARNINGS:
            logging.warning(f"{text} (more like this are only counted, and told at the epoch's end)")

    def too_few(self) -> UserError:
        """Why the samples of the worker's shards make no batch."""
        rank, _, worker, workers = pytorch_worker_info()
        counts, used = self._counts, self._used_in_pass
        whose = f"worker {worker + 1} of {workers} on rank {rank} finds {used} usable samples"
        findings = [*([counts.reasons()] if counts.left_out else []), *counts.of_broken(), *counts.of_sizes()]
        why = "; ".join(findings) or "they are empty, or the names of their files have no ending"
        if used:
            also = f" (not usable: {why})" if findings else ""
            return UserError(f"{whose} in its shards{also}, less than one batch: lower --batch-size or --workers")
        return UserError(f"{whose} among the {counts.unused:,} that it looked at: {why}: {counts.cure}")


def _of(samples: int, recorded: int | None) -> str:
    return f"{samples:,} samples" if recorded is None else f"{samples:,} of {recorded:,} samples"


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:150]}...{text[-147:]}"

"""The samples of a data worker, pass by pass over its shards, numbered as they leave the shuffle.

A stream that is resumed inside an epoch reads what it read before, up to where it stood, but decodes nothing of it and
does not open shards that were through: stand-ins take the place of their samples in the shuffle. On other ranks,
workers or batch sizes a worker gets a slice of the samples that nobody has seen in the epoch.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain, repeat
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from webdataset.utils import pytorch_worker_info

from ..errors import UserError
from .manifest import ShardManifest
from .position import IntArray, SeenSamples, WorkerPosition
from .rng import derived, seed_augmentation
from .tally import Tally

MAX_CAPTION_BYTES = 16 << 10  # a tokenizer may take hours over one word of a megabyte
ID, ORDINAL = "__id__", "__ordinal__"  # webdataset leaves entries alone that begin with __
PLACE = "__place__"  # of the sample's shard in the pass
Sample = dict[str, Any]
Slice = list[tuple[str, npt.NDArray[np.int32]]]  # shards and the ordinals in them


class SharedEpoch(Protocol):
    """The loader's counter of epochs, which its workers see."""

    def get_value(self) -> int: ...

    def set_value(self, epoch: int) -> None: ...


@dataclass
class Pass:
    """One time over a worker's shards."""

    number: int  # in the epoch
    placeholders: int = 0  # for batches that were trained before
    skip: int = 0  # samples that left the shuffle before
    through: dict[int, int] = field(default_factory=dict)  # place of a shard that was finished before: samples
    slice: Slice | None = None  # what to read instead of the shards
    ordinal: int = 0  # of the next sample to leave the shuffle
    read: dict[int, int] = field(default_factory=dict)  # place of a shard that was read to its end: samples
    left: Counter[int] = field(default_factory=Counter)  # place: samples that have left the shuffle
    finished: list[tuple[int, int, int]] = field(default_factory=list)  # (last ordinal, place, samples), to be reported

    def check_finished(self, place: int) -> None:
        """Note a shard of which all samples have left the shuffle."""
        if self.left[place] == self.read.get(place):
            self.finished.append((self.ordinal - 1, place, self.read.pop(place)))
            del self.left[place]

    def position(self, ordinal: int) -> IntArray:
        """[number, ordinal, (place, samples) of shards that were finished before `ordinal` and not reported yet]."""
        ready = [shard[1:] for shard in self.finished if shard[0] < ordinal]
        self.finished = [shard for shard in self.finished if shard[0] >= ordinal]
        return np.array([self.number, ordinal, *chain(*ready)])


@dataclass(frozen=True)
class Resumed:
    """How the workers of a rank go on inside `epoch`: from positions, or with slices, or from anew (neither)."""

    epoch: int
    batches: int  # of the rank that were trained before
    workers: list[WorkerPosition] | None = None
    slices: list[Slice] | None = None


class SampleStream:
    """Stages of OpenCLIP's pipeline for training: read, (its shuffle), leave_shuffle, (decoding), batches.

    shard_stages: the stages before the shards are dealt out; read_shard: {"url": ...} -> its samples; batch: OpenCLIP's
    stage. The processes of the workers have a copy each.
    """

    partial_epoch = False

    def __init__(
        self,
        shard_stages: list[Any],
        read_shard: Callable[[Sample], Iterator[Sample]],
        batch: Any,
        manifest: ShardManifest | None,
        seed: int,
        shared_epoch: SharedEpoch,
        num_workers: int,
        tally: Tally,
    ):
        self.shard_stages, self.read_shard, self.batch, self.manifest = shard_stages, read_shard, batch, manifest
        self.seed, self.shared_epoch, self.num_workers = seed, shared_epoch, max(1, num_workers)
        self.tally = tally
        self.in_order = not hasattr(shard_stages[0], "worker_seed")
        self.resumed: Resumed | None = None
        self.epoch = -1
        self.now = Pass(0)
        self.carried: list[Any] = []  # samples of a slice that filled no batch yet

    @property
    def _known_shards(self) -> ShardManifest:
        assert self.manifest is not None  # slices are of positions in shards
        return self.manifest

    def _begin_pass(self) -> None:
        epoch, worker = self.shared_epoch.get_value(), pytorch_worker_info()[2]
        if epoch == self.epoch:
            self.now = Pass(self.now.number + 1)
            return
        self.epoch, self.now, self.carried = epoch, Pass(0), []
        resumed = self.resumed
        if resumed is None or resumed.epoch != epoch:
            return
        self.now.placeholders = len(range(worker, resumed.batches, self.num_workers))
        if resumed.slices is not None:
            self.now.slice = resumed.slices[worker]
        elif resumed.workers is not None:
            position = resumed.workers[worker]
            self.now.number, self.now.skip = position.number, position.ordinal
            self.now.through = dict(zip(position.finished[::2], position.finished[1::2], strict=True))

    def read(self, shards: Iterable[Sample]) -> Iterator[Sample]:
        """The samples of a pass, in the order of the shards."""
        now = self.now
        if now.slice is not None:
            yield from self._read_slice(now.slice)
            return
        for place, shard in enumerate(shards):
            if place in now.through:
                yield from repeat({}, now.through[place])
                continue
            count = 0
            for sample in self.read_shard(shard):
                count += 1
                sample[PLACE] = place
                yield sample
            now.read[place] = count
            now.check_finished(place)

    def _read_slice(self, part: Slice) -> Iterator[Sample]:
        for url, ordinals in part:
            wanted = set((ordinals + self._known_shards.offsets[url]).tolist())
            yield from (sample for sample in self.read_shard({"url": url}) if sample[ID] in wanted)

    def leave_shuffle(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Number the samples, drop those that left before, and seed what the decoding of each draws from."""
        now = self.now
        rank, _, worker, _ = pytorch_worker_info()
        for sample in samples:
            ordinal = now.ordinal
            now.ordinal += 1
            place = sample.get(PLACE)
            if place is not None:
                now.left[place] += 1
                now.check_finished(place)
            if ordinal >= now.skip:
                sample[ORDINAL] = ordinal
                # not by id: a sample that comes twice in an epoch shall not look the same twice
                seed_augmentation(self.seed, self.epoch, rank, worker, now.number, ordinal)
                yield sample

    def batches(self, samples: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...] | None]:
        """(images, texts, ids [b], position) of one pass; None for each batch that was trained before."""
        self._begin_pass()
        self.tally.begin_pass()
        now = self.now
        yield from repeat(None, now.placeholders)
        waiting, made = [], 0

        def counted() -> Iterator[tuple[Any, ...]]:
            for sample in chain(self.carried, self.tally.used(samples)):
                waiting.append(sample)
                yield sample

        for *contents, ordinals in self.batch(counted()):
            del waiting[: len(ordinals)]
            made += 1
            self.tally.publish()
            yield *contents, now.position(int(ordinals[-1]) + 1)
        self.tally.publish()
        self.carried = waiting if now.slice is not None else []
        if not made and not now.skip and now.slice is None:
            raise self.tally.too_few()

    def resume(self, epoch: int, batches: int, workers: list[WorkerPosition], start: int) -> None:
        """See position.Source."""
        self.resumed = Resumed(epoch, batches, workers=workers)
        if start:
            self._reseed_draws(epoch, start)

    def resume_remaining(self, epoch: int, first: int, num_batches: int, seen: SeenSamples) -> None:
        """See position.Source."""
        if not self.in_order:
            self.resumed = Resumed(epoch, first)
            self._reseed_draws(epoch, first)
            return
        if self.manifest is None:
            raise UserError(
                "inside an epoch, a run with --sample-id json-key goes on only with the same number of processes, "
                "--workers and --batch-size: keep them, or resume from the end of an epoch"
            )
        self.resumed = Resumed(epoch, first, slices=self._slices(epoch, first, num_batches, seen))

    def _reseed_draws(self, epoch: int, start: int) -> None:
        """Give the draws of shards by chance in `epoch` another seed: those from its beginning have been used."""
        shards, stock_seed = self.shard_stages[0], self.shard_stages[0].worker_seed

        def worker_seed() -> int:
            rank, _, worker, _ = pytorch_worker_info()
            return derived(self.seed, rank, worker, start) if self.shared_epoch.get_value() == epoch else stock_seed()

        shards.worker_seed = worker_seed

    def _slices(self, epoch: int, first: int, num_batches: int, seen: SeenSamples) -> list[Slice]:
        """Contiguous slices of the unseen samples in the epoch's order of shards, for this rank's workers.

        A slice is its worker's share of them and, if that fills no whole batches, up to a batch of its neighbours'.
        What is missing even then comes from the worker's own shards.
        """
        rank, world_size, _, _ = pytorch_worker_info()
        step, batch_size = self.num_workers, self.batch.args[0]
        # batch k is worker k % step's
        batches = [len(range(w, num_batches, step)) - len(range(w, first, step)) for w in range(step)]
        before = [0, *accumulate(batches * world_size)]
        num_unseen = seen.num_samples - len(seen)
        bounds = []
        for worker in range(step):
            number = rank * step + worker
            begin, end = (num_unseen * before[n] // max(1, before[-1]) for n in (number, number + 1))
            size = min(batches[worker] * batch_size, end - begin + batch_size)
            begin = max(0, min(begin, num_unseen - size))
            bounds.append((begin, begin + size))
        slices: list[Slice] = [[] for _ in bounds]
        passed = 0
        for url in self._order(epoch):
            unseen = seen.missing(self._known_shards.ids[url])
            for part, (begin, end) in zip(slices, bounds, strict=True):
                ordinals = unseen[max(0, begin - passed) : max(0, end - passed)]
                if len(ordinals):
                    part.append((url, ordinals.astype(np.int32)))
            passed += len(unseen)
        return slices

    def _order(self, epoch: int) -> list[str]:
        """The shards, each once, in the order in which OpenCLIP deals them out in `epoch`."""
        self.shared_epoch.set_value(epoch)
        shards, shuffle = self.shard_stages
        return list(dict.fromkeys(shard["url"] for shard in shuffle.run(iter(shards))))

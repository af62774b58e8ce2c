"""What the batches of a running epoch held, and how a loader is made to go on from there.

On the same ranks, workers and batch size every worker goes on in its stream exactly where it stood. On others the
rest of the epoch is dealt out anew: the samples that no rank has seen in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from webdataset.utils import pytorch_worker_info

BLOCK = 1 << 16  # samples that are stored together
IntArray = npt.NDArray[np.int64]
SavedPosition = Mapping[str, Tensor]  # what DataPosition.tensors() gave


class SeenSamples:
    """A set of numbers below num_samples. A block takes a byte a sample of memory, 8 KiB in a file, or nothing."""

    def __init__(self, num_samples: int, saved: Iterable[SavedPosition] = ()):
        """saved: what tensors() of other sets gave, which are joined here."""
        num_blocks = -(-num_samples // BLOCK)
        self.num_samples = num_samples
        self._blocks = np.zeros((num_blocks, BLOCK), bool)  # pages that nobody wrote to take no memory
        self._samples = self._blocks.reshape(-1)
        self._touched = np.zeros(num_blocks, bool)
        for tensors in saved:
            blocks = tensors["seen_blocks"].numpy()
            self._blocks[blocks] |= np.unpackbits(tensors["seen_bits"].numpy(), axis=1).view(bool)
            self._touched[blocks] = True

    def __len__(self) -> int:
        return int(self._samples.sum())

    def add(self, ids: IntArray) -> None:
        """Add ids [b] int64; a few microseconds."""
        self._samples[ids] = True
        self._touched[ids // BLOCK] = True

    def missing(self, ids: range) -> IntArray:
        """Those of consecutive ids that are not in the set, counted from the first of them."""
        return np.flatnonzero(~self._samples[ids.start : ids.stop])

    def tensors(self) -> dict[str, Tensor]:
        """The set as bits, in blocks; a copy."""
        blocks = np.flatnonzero(self._touched)
        bits = np.packbits(self._blocks[blocks], axis=1)
        return {"seen_blocks": torch.from_numpy(blocks), "seen_bits": torch.from_numpy(bits)}


@dataclass
class WorkerPosition:
    """Where the stream of one data worker stands after its last batch; a pass is one time over the worker's shards."""

    number: int = 0  # of the pass, in the epoch
    ordinal: int = 0  # samples of the pass that have left the shuffle
    finished: list[int] = field(default_factory=list)  # number in the pass, samples, of each shard that is through


class Source(Protocol):
    """What delivers the samples of one rank: stream.SampleStream or rows.RowOrder."""

    in_order: bool  # an epoch goes through all samples, instead of drawing shards by chance
    partial_epoch: bool  # an epoch ends when no whole batch is left, instead of filling the last one

    def resume(self, epoch: int, batches: int, workers: list[WorkerPosition], start: int) -> None:
        """In `epoch` leave out this rank's first `batches` batches; `start` as in DataPosition."""

    def resume_remaining(self, epoch: int, first: int, num_batches: int, seen: SeenSamples) -> None:
        """In `epoch` leave out all samples that are seen and count the batches from `first` to num_batches.

        Raises UserError if the source cannot tell which samples those are.
        """


class DataPosition:
    """This rank's data inside the running epoch: which samples it has had, and where its workers' streams stand."""

    def __init__(self, source: Source, num_samples: int, batch_size: int, workers: int, per_epoch: int | None = None):
        """num_samples: above all ids. per_epoch: samples of an epoch, before the loader rounds them up to batches."""
        self.source = source
        self.num_samples, self.batch_size, self.num_workers = num_samples, batch_size, max(1, workers)
        self.per_epoch = num_samples if per_epoch is None else per_epoch
        self._begin(epoch=-1)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.batches = 0  # of this rank, counted from the epoch's start
        self.samples = 0  # of this rank
        self.is_redistributed = False  # the epoch was dealt out anew inside it, so the workers' positions mean nothing
        self.start = 0  # batch at which the draws of shards by chance began anew
        self.seen = SeenSamples(self.num_samples)
        self.workers = [WorkerPosition() for _ in range(self.num_workers)]

    def start_epoch(self, epoch: int) -> None:
        """Forget the last epoch; nothing, if resume_position has put the position into `epoch`."""
        if epoch != self.epoch:
            self._begin(epoch)

    def record(self, ids: Tensor, positions: Any) -> None:
        """Count a batch that was handed to the loop: its ids [b] and its worker's position (empty for rows)."""
        self.seen.add(ids.numpy())
        if len(positions):
            number, ordinal, *finished = positions.tolist()
            worker = self.workers[self.batches % self.num_workers]
            if number != worker.number:
                worker.number, worker.finished = number, []
            worker.ordinal = ordinal
            worker.finished += finished
        self.batches += 1
        self.samples += len(ids)

    def tensors(self) -> dict[str, Tensor]:
        """The position as CPU tensors that later batches do not change."""
        return {
            "samples": torch.tensor([self.samples]),
            "is_rest": torch.tensor([self.is_redistributed]),
            "start": torch.tensor([self.start]),
            "workers": torch.tensor([[w.number, w.ordinal] for w in self.workers]),
            "num_finished": torch.tensor([len(w.finished) for w in self.workers]),
            "finished": torch.tensor([n for w in self.workers for n in w.finished], dtype=torch.int64),
            **self.seen.tensors(),
        }

    def put(self, epoch: int, batches: int, saved: SavedPosition) -> None:
        """Stand where the same rank stood when it saved `saved`."""
        self._begin(epoch)
        self.batches, self.samples, self.start = batches, int(saved["samples"]), int(saved["start"])
        self.seen = SeenSamples(self.num_samples, [saved])
        finished = torch.split(saved["finished"], saved["num_finished"].tolist())
        self.workers = [
            WorkerPosition(number, ordinal, shards.tolist())
            for (number, ordinal), shards in zip(saved["workers"].tolist(), finished, strict=True)
        ]


def resume_position(
    dataloader: Any,
    position: DataPosition,
    epoch: int,
    batches: int,
    saved: Sequence[SavedPosition],
    same_layout: bool,
    accum_freq: int = 1,
    epoch_is_done: bool = False,
) -> int:
    """Make `dataloader`, not iterated yet, go on inside `epoch`; the number of its first batch, counted as if whole.

    batches: that each rank had had when DataPosition.tensors() of all ranks, `saved` in rank order, were taken.
    same_layout: ranks, workers and batch size are the same. In place of batches that were trained before, or that
    the epoch has less now, the loader yields None (shards) or nothing (rows). Raises UserError if the rest of the
    epoch cannot be found out.
    """
    rank, world_size, _, _ = pytorch_worker_info()
    if same_layout and not any(tensors["is_rest"] for tensors in saved):
        position.put(epoch, batches, saved[rank])
        position.source.resume(epoch, batches, position.workers, position.start)
        return batches
    seen = SeenSamples(position.num_samples, saved)
    samples = sum(int(tensors["samples"]) for tensors in saved)
    num_batches: int = dataloader.num_batches
    global_batch_size = position.batch_size * world_size
    rest = 0 if epoch_is_done else _rest_of_epoch(position, global_batch_size, seen, samples)
    first = max(0, num_batches - rest)
    if position.source.partial_epoch:  # no more batches than there are: the ranks must have equally many
        first = min(num_batches, first + -first % accum_freq)
    else:
        first -= first % accum_freq
    position.source.resume_remaining(epoch, first, num_batches, seen)
    position._begin(epoch)
    position.batches = position.start = first
    position.is_redistributed = position.source.in_order
    if rank == 0:  # the ranks' parts are joined when they are read
        position.seen, position.samples = seen, samples
    return first


def _rest_of_epoch(position: DataPosition, global_batch_size: int, seen: SeenSamples, samples: int) -> int:
    """Batches of each rank that the epoch still needs, of which `samples` samples were trained on, repetitions too.

    The loader's own length of an epoch would not do: how far that is rounded up depends on the ranks and workers.
    """
    rest = position.per_epoch - samples
    if position.source.in_order and seen.num_samples <= position.per_epoch < 2 * seen.num_samples:
        rest = max(rest, seen.num_samples - len(seen))  # a whole pass leaves no sample out, repetitions or not
    rest = max(0, rest)
    return rest // global_batch_size if position.source.partial_epoch else -(-rest // global_batch_size)

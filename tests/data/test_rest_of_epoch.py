"""An epoch that is saved inside and goes on with other ranks, workers or batches is as long as an undisturbed one.

The workers' streams are the product's own; their shards hold numbers alone, and they run one after the other here.
"""

import copy
import math
from collections import Counter
from itertools import chain, islice
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_train.data import SharedEpoch, detshuffle2

from open_clip_train_fastclip.data.manifest import ShardManifest
from open_clip_train_fastclip.data.position import DataPosition, resume_position
from open_clip_train_fastclip.data.stream import ID, ORDINAL, SampleStream
from open_clip_train_fastclip.data.tally import Tally

EPOCH, SEED = 1, 3


class Layout(NamedTuple):
    ranks: int
    workers: int
    batch_size: int

    @property
    def global_batch(self):
        return self.ranks * self.batch_size

    def num_batches(self, per_epoch):
        """Batches a rank, as OpenCLIP rounds them up to whole batches of every worker."""
        return math.ceil(math.ceil(per_epoch / self.global_batch) / self.workers) * self.workers


def manifest_of_sizes(sizes):
    urls = tuple(f"{number:05d}.tar" for number in range(len(sizes)))
    return ShardManifest(urls, urls, tuple(sizes))


def position_on(layout, manifest, per_epoch):
    shards = wds.SimpleShardList(list(manifest.urls))
    shared_epoch = SharedEpoch(EPOCH)
    shuffle = detshuffle2(bufsize=2000, initial=500, seed=SEED, epoch=shared_epoch)

    def read_shard(shard):
        return ({ID: id_} for id_ in manifest.ids[shard["url"]])

    batch = wds.batched(layout.batch_size, partial=False)
    stream = SampleStream([shards, shuffle], read_shard, batch, manifest, SEED, shared_epoch, layout.workers, Tally(0))
    return DataPosition(stream, manifest.num_samples, layout.batch_size, layout.workers, per_epoch)


def batches_of_worker(stream, layout, rank, worker, number):
    """Ids and positions of a worker's batches in the epoch; None for those that were trained before."""

    def passes():
        while True:
            shards, shuffle = stream.shard_stages
            own = list(shuffle.run(iter(shards)))[rank :: layout.ranks][worker :: layout.workers]
            samples = stream.leave_shuffle(stream.read(own))
            yield stream.batches((sample[ID], sample[ORDINAL]) for sample in samples)

    return list(islice(chain.from_iterable(passes()), number))


def epoch_on(layout, manifest, per_epoch, until=None, resumed=None):
    """Ids that all ranks train in an epoch (or `until` a number of batches), their positions, and the first batch.

    resumed: (batches, saved positions, accum_freq) of a run on another layout.
    """
    ids, saved, firsts = [], [], set()
    num_batches = layout.num_batches(per_epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(layout.ranks))
        patch.setenv("NUM_WORKERS", str(layout.workers))
        for rank in range(layout.ranks):
            patch.setenv("RANK", str(rank))
            position, first = position_on(layout, manifest, per_epoch), 0
            position.start_epoch(EPOCH)
            if resumed is not None:
                batches, before, accum_freq = resumed
                loader = SimpleNamespace(num_batches=num_batches)
                first = resume_position(loader, position, EPOCH, batches, before, False, accum_freq)
            firsts.add(first)
            streams = []
            for worker in range(layout.workers):
                patch.setenv("WORKER", str(worker))
                stream = copy.copy(position.source)
                streams.append(batches_of_worker(stream, layout, rank, worker, num_batches // layout.workers))
            for number in range(first, num_batches if until is None else until):
                of_batch, place = streams[number % layout.workers][number // layout.workers]
                position.record(torch.as_tensor(of_batch), torch.as_tensor(place))
                ids += of_batch.tolist()
            saved.append(position.tensors())
    assert len(firsts) == 1, "the ranks agree"
    return ids, saved, firsts.pop()


layouts = st.builds(Layout, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_rest_is_what_the_undisturbed_run_would_have_trained(data):
    """N samples, an epoch of E, saved after `before` samples of which `distinct` were different ones.

    The rest is E - before samples; where the epoch is one pass and a part (N <= E < 2N), at least the N - distinct that
    nobody has seen. It is rounded up to whole steps, since a step has one length: less than a step more, on any layout.
    Without repetitions before (distinct = before) an epoch of one pass, E = N, has every sample once, and again only
    what fills the last step.
    """
    sizes = data.draw(st.lists(st.integers(8, 20), min_size=9, max_size=12), "sizes")
    manifest = manifest_of_sizes(sizes)
    total = manifest.num_samples
    per_epoch = data.draw(st.one_of(st.just(total), st.integers(total // 3, 3 * total)), "samples of an epoch")
    old, new = data.draw(layouts, "before"), data.draw(layouts, "after")
    accum_freq = data.draw(st.integers(1, 3), "accumulation")
    batches = data.draw(st.integers(1, old.num_batches(per_epoch)), "batches before")

    before, saved, _ = epoch_on(old, manifest, per_epoch, until=batches)
    after, _, first = epoch_on(new, manifest, per_epoch, resumed=(batches, saved, accum_freq))

    distinct, is_one_pass = len(set(before)), total <= per_epoch < 2 * total
    rest = max(0, per_epoch - len(before), total - distinct if is_one_pass else 0)
    assert rest <= len(after) < rest + accum_freq * new.global_batch
    assert first % accum_freq == 0
    if is_one_pass:
        assert {*before, *after} == set(range(total))
    unseen = set(range(total)) - set(before)
    assert len(unseen & set(after)) >= min(rest, len(unseen))
    if per_epoch == total == len(unseen) + len(before):
        assert sum(Counter(after).values()) - len(unseen) < accum_freq * new.global_batch


def test_an_epoch_longer_than_the_data():
    """96 samples, an epoch of 144, saved after 64: 80 are left, of which the 32 unseen ones come first of all."""
    manifest = manifest_of_sizes([24] * 4)
    before, saved, _ = epoch_on(Layout(1, 1, 8), manifest, 144, until=8)
    after, _, first = epoch_on(Layout(1, 1, 4), manifest, 144, resumed=(8, saved, 1))
    assert (len(before), len(after), first) == (64, 80, 16)
    assert set(after[:32]) == set(range(96)) - set(before)

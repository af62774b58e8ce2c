"""A loader that goes on inside an epoch: the very next batch on the same ranks, every unseen sample once on others."""

import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import SEED, numbered_loader, numbered_rows, openclip_args, preprocess, tokenizer
from make_data import make_csv, make_shards, write_tar
from open_clip_train import data as openclip_data
from torch.utils.data import DistributedSampler

from open_clip_train_fastclip.data.position import BLOCK, DataPosition, SeenSamples, resume_position
from open_clip_train_fastclip.data.rng import seeded_iterator
from open_clip_train_fastclip.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # OpenCLIP sets it without a GPU, too

EPOCH = 1


def augment(image):
    """The image's bytes and a draw from each generator that a transform may use."""
    draws = [int(torch.randint(1000, ())), int(np.random.randint(1000)), random.randrange(1000)]
    return torch.cat([preprocess(image).flatten(), torch.tensor(draws)])


def shards(folder, per_shard=(6, 5, 7, 6, 8, 6, 5, 7), broken=()):
    """The pattern of shards of which the samples with numbers in `broken` cannot be decoded."""
    data = make_shards(folder, per_shard=list(per_shard), kinds=("png", "txt"))
    for path in sorted(folder.glob("*.tar")) if broken else ():
        with tarfile.open(path) as tar:
            files = [(member.name, tar.extractfile(member).read()) for member in tar]
        write_tar(path, [(n, b"" if n in {f"{b:09d}.png" for b in broken} else content) for n, content in files])
    return data


def shard_loader(data, manifest=None, **changed):
    settings = {"transform": augment, "buffer": 6, **changed}
    return numbered_loader(data, manifest, **settings)


def train(info, epoch=EPOCH, rank=0):
    """The rest of an epoch's batches as lists, each counted before it is yielded, as training does."""
    info.set_epoch(epoch)
    info.position.start_epoch(epoch)
    for images, texts, ids, positions in seeded_iterator(info.dataloader, SEED, epoch, rank):
        info.position.record(ids, positions)
        yield images.tolist(), texts.tolist(), ids.tolist()


def same(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def whole_epoch(info, rank=0):
    """An epoch's batches, and the position after each number of them."""
    batches, positions = [], []
    for batch in train(info, rank=rank):
        if not positions:
            positions.append(None)
        batches.append(batch)
        positions.append(info.position.tensors())
    return batches, positions


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(
    ("kind", "workers", "ranks"),
    [
        *(("shards", workers, ranks) for workers in (0, 1, 2, 3) for ranks in (1, 2)),
        ("resampled", 0, 1),
        ("resampled", 2, 2),
        ("json-key", 2, 1),
    ],
)
def test_shards_go_on_with_the_very_next_batch(kind, workers, ranks, tmp_path, as_rank):
    """In the first pass over the shards and in later ones; the next epoch is that of an undisturbed run, too."""
    data = shards(tmp_path, broken=(1, 17, 18, 19, 40))
    settings = {"workers": workers, "world_size": ranks, "train_num_samples": 100}
    settings |= {"resampled": {"dataset_resampled": True}, "json-key": {"sample_id": "json-key"}}.get(kind, {})
    saved, expected, following = [], [], []
    for rank in range(ranks):
        as_rank(rank, ranks)
        info = shard_loader(data, **settings)
        batches, positions = whole_epoch(info, rank)
        saved.append(positions)
        expected.append(batches)
        following.append(list(train(info, EPOCH + 1, rank)))
    if kind != "resampled":
        assert max(int(of_rank[-1]["workers"][:, 0].max()) for of_rank in saved) >= 1, "several passes"
    assert any(len(position["finished"]) for of_rank in saved for position in of_rank[1:])
    total = len(expected[0])
    for rank in range(ranks):
        as_rank(rank, ranks)
        for n in {1, 2, total // 3, total // 2, total - 1, total}:
            info = shard_loader(data, **settings)
            now = [of_rank[n] for of_rank in saved]
            assert resume_position(info.dataloader, info.position, EPOCH, n, now, same_layout=True) == n
            assert same(info.position.tensors(), saved[rank][n]) and info.position.batches == n
            assert list(train(info, rank=rank)) == expected[rank][n:]
            assert same(info.position.tensors(), saved[rank][-1])
            if n == total // 2:
                assert list(train(info, EPOCH + 1, rank)) == following[rank]


def finished_shards(manifest_pattern, per_shard, ids):
    """Paths of the shards all of whose samples are in ids."""
    folder, begin, paths = Path(manifest_pattern).parent, 0, []
    for number, count in enumerate(per_shard):
        if set(range(begin, begin + count)) <= set(ids):
            paths.append(folder / f"{number:05d}.tar")
        begin += count
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_finished_shards_are_not_opened_and_nothing_is_decoded_again(workers, tmp_path):
    per_shard = [6] * 8
    decoded = torch.zeros(48, dtype=torch.int64).share_memory_()

    def counting(image):
        contents = preprocess(image)
        decoded[int(np.rint(contents.numpy().reshape(-1, 3).mean(0) / 8) @ (1024, 32, 1))] += 1
        return contents

    data = shards(tmp_path, per_shard)
    settings = {"workers": workers, "transform": counting, "buffer": 3}
    expected, positions = whole_epoch(shard_loader(data, **settings))
    n = 8
    before = {id_ for _, _, ids in expected[:n] for id_ in ids}
    finished = finished_shards(data, per_shard, before)
    assert len(finished) >= 3
    info = shard_loader(data, **settings)
    resume_position(info.dataloader, info.position, EPOCH, n, [positions[n]], same_layout=True)
    for path in finished:
        path.unlink()
    decoded.zero_()
    assert list(train(info)) == expected[n:]
    assert decoded[sorted(before)].sum() == 0


LAYOUTS = {  # ranks, workers, batch size: before, batches trained on each rank, after
    "fewer ranks": ((2, 1, 4), 3, (1, 2, 4)),
    "more ranks": ((1, 2, 4), 6, (2, 1, 4)),
    "more workers": ((1, 1, 4), 5, (1, 3, 4)),
    "other batches": ((1, 0, 4), 5, (1, 0, 6)),
    "all": ((2, 2, 2), 10, (3, 1, 3)),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_another_layout_every_unseen_sample_comes_once(layout, tmp_path, as_rank):
    """Apart from what fills the last batch; finished shards are not opened; twice in the same epoch."""
    per_shard = [6, 5, 7, 6, 8, 6, 5, 7]
    data = shards(tmp_path, per_shard)
    before, trained, after = LAYOUTS[layout]
    read_all = shard_loader(data)  # the sizes, before files vanish
    manifest = read_all.position.source.manifest

    def part_of_epoch(layout, batches, saved=None, trained=0, was_same=False):
        """Ids of each rank's batches (a number of them, or all), positions, and the first batch."""
        ranks, workers, batch_size = layout
        all_ids, positions, firsts = [], [], set()
        for rank in range(ranks):
            as_rank(rank, ranks)
            info = shard_loader(data, manifest, workers=workers, world_size=ranks, batch_size=batch_size, buffer=3)
            if saved:
                first = resume_position(info.dataloader, info.position, EPOCH, trained, saved, was_same)
                assert info.position.batches == first
                firsts.add(first)
            ids = []
            for _, _, batch in train(info, rank=rank):
                ids += batch
                assert len(batch) == batch_size
                if info.position.batches == batches:
                    break
            assert info.position.batches == (batches or info.dataloader.num_batches)
            all_ids += ids
            positions.append(info.position.tensors())
        assert len(firsts) <= 1, "the ranks agree"
        return all_ids, positions, max(firsts, default=0)

    seen, saved, _ = part_of_epoch(before, trained)
    finished = finished_shards(data, per_shard, seen)
    assert finished
    for path in finished:
        path.unlink()
    ids, positions, first = part_of_epoch(after, None, saved, trained)
    global_batch = after[0] * after[2]
    unseen = set(range(50)) - set(seen)
    assert set(ids) == unseen
    assert len(ids) - len(unseen) < global_batch

    ids, positions, _ = part_of_epoch(after, first + 1, saved, trained)
    assert len(ids) == global_batch and set(ids) <= unseen
    seen = {*seen, *ids}
    for path in finished_shards(data, per_shard, seen):
        path.unlink(missing_ok=True)
    ids, _, again = part_of_epoch(after, None, positions, first + 1, was_same=True)
    assert again == first + 1
    assert set(ids) == set(range(50)) - seen
    assert len(ids) - len(set(ids)) < global_batch


def test_a_rest_with_broken_samples(tmp_path):
    """What they leave of a batch is filled up from the worker's shards."""
    saved = DataPosition(None, 48, 8, 0)
    saved.record(torch.arange(32), [])
    info = shard_loader(shards(tmp_path, [12] * 4, broken=(35, 40)), batch_size=8)
    assert resume_position(info.dataloader, info.position, EPOCH, 4, [saved.tensors()], same_layout=False) == 4
    ids = [id_ for _, _, ids in train(info) for id_ in ids]
    assert len(ids) == 16 and set(range(32, 48)) - {35, 40} <= set(ids)


def test_a_rest_without_a_usable_sample(tmp_path):
    """The batches that are owed are filled from the worker's shards."""
    data = shards(tmp_path, broken=range(32, 50))
    saved = DataPosition(None, 50, 4, 0)
    saved.record(torch.arange(32), [])
    info = shard_loader(data, batch_size=8)
    assert resume_position(info.dataloader, info.position, EPOCH, 8, [saved.tensors()], same_layout=False) == 4
    batches = list(train(info))
    assert len(batches) == 3 and {id_ for _, _, ids in batches for id_ in ids} <= set(range(32))


@pytest.mark.parametrize(
    ("per_epoch", "seen", "trained", "accum_freq", "first"),
    [
        (48, 16, 16, 1, 2),  # 32 are left, 4 batches of 8
        (48, 13, 16, 1, 1),  # of 16 some were seen twice: 35 are left, 5 batches
        (48, 16, 16, 4, 0),  # whole steps of 4 batches
        (48, 48, 48, 1, 6),  # nothing is left
        (24, 16, 16, 1, 2),  # an epoch of half the data: 1 batch of 8 is left
        (96, 48, 56, 1, 7),  # an epoch of two passes, the second begun
    ],
)
def test_the_first_batch_on_another_layout(per_epoch, seen, trained, accum_freq, first, tmp_path):
    data = make_shards(tmp_path, per_shard=[48], kinds=("png", "txt"))
    info = shard_loader(data, train_num_samples=per_epoch, batch_size=8)
    position = DataPosition(None, 48, 4, 0)
    position.record(torch.tensor([*range(seen), *[0] * (trained - seen)]), [])
    saved = [position.tensors()]
    assert resume_position(info.dataloader, info.position, EPOCH, 4, saved, False, accum_freq) == first
    assert len(list(train(info))) == per_epoch // 8 - first


def test_the_rest_of_an_epoch_of_two_passes(tmp_path):
    """The unseen samples, and then not them again but all."""
    info = shard_loader(shards(tmp_path, [12] * 4), train_num_samples=96, batch_size=16)
    position = DataPosition(None, 48, 8, 0)
    position.record(torch.arange(40), [])
    assert resume_position(info.dataloader, info.position, EPOCH, 5, [position.tensors()], same_layout=False) == 2
    times = Counter(id_ for _, _, ids in train(info) for id_ in ids)
    assert times.total() == 64 and set(range(40, 48)) <= set(times)
    assert len(times) > 40 and max(times.values()) <= 3


def test_resampled_shards_on_another_layout(tmp_path):
    """The same share of the epoch is left, with other draws of shards than at its beginning, and can be repeated."""
    data = shards(tmp_path)
    settings = {"dataset_resampled": True, "train_num_samples": 96}
    info = shard_loader(data, **settings)
    _, positions = whole_epoch(info)
    settings |= {"batch_size": 8, "workers": 2}
    beginning = list(train(shard_loader(data, **settings)))
    info = shard_loader(data, **settings)
    assert resume_position(info.dataloader, info.position, EPOCH, 8, [positions[8]], same_layout=False) == 8 // 2
    rest, saved = [], []
    for batch in train(info):
        rest.append(batch)
        saved.append(info.position.tensors())
    assert len(rest) == 96 // 8 - 4
    assert [ids for _, _, ids in rest[:4]] != [ids for _, _, ids in beginning[:4]]
    again = shard_loader(data, **settings)
    assert resume_position(again.dataloader, again.position, EPOCH, 6, [saved[1]], same_layout=True) == 6
    assert list(train(again)) == rest[2:]
    assert list(train(again, EPOCH + 1)) == list(train(info, EPOCH + 1))


def test_json_keys_on_another_layout_are_refused(tmp_path):
    data = shards(tmp_path)
    _, positions = whole_epoch(shard_loader(data, sample_id="json-key"))
    info = shard_loader(data, sample_id="json-key", batch_size=8)
    with pytest.raises(UserError, match="json-key goes on only with the same.*end of an epoch"):
        resume_position(info.dataloader, info.position, EPOCH, 3, [positions[3]], same_layout=False)


def row_loader(path, rank, ranks, monkeypatch, **changed):
    """OpenCLIP's loader of a table as on a rank, without a process group."""

    class SamplerOfRank(DistributedSampler):
        def __init__(self, rows):
            super().__init__(rows, num_replicas=ranks, rank=rank)

    monkeypatch.setattr(openclip_data, "DistributedSampler", SamplerOfRank)
    args = openclip_args(path, distributed=ranks > 1, **changed)
    return numbered_rows(openclip_data.get_csv_dataset(args, augment, is_train=True, tokenizer=tokenizer))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_go_on_with_the_very_next_batch(workers, ranks, tmp_path, as_rank, monkeypatch):
    path = make_csv(tmp_path, rows=45)
    for rank in range(ranks):
        as_rank(rank, ranks)
        info = row_loader(path, rank, ranks, monkeypatch, workers=workers)
        expected, positions = whole_epoch(info, rank)
        following = list(train(info, EPOCH + 1, rank))
        for n in {1, 3, len(expected)}:
            info = row_loader(path, rank, ranks, monkeypatch, workers=workers)
            assert resume_position(info.dataloader, info.position, EPOCH, n, [positions[n]] * ranks, True) == n
            assert list(train(info, rank=rank)) == expected[n:]
            assert same(info.position.tensors(), positions[-1])
            assert list(train(info, EPOCH + 1, rank)) == following


def test_rows_on_another_layout(tmp_path, as_rank, monkeypatch):
    """Every unseen row at most once; what fills no batch is left out, as at the end of every epoch of a table."""
    path = make_csv(tmp_path, rows=45)
    seen, saved = [], []
    for rank in range(2):
        as_rank(rank, 2)
        info = row_loader(path, rank, 2, monkeypatch)
        for _, _, ids in train(info, rank=rank):
            seen += ids
            if info.position.batches == 2:
                break
        saved.append(info.position.tensors())
    as_rank(0, 1)
    info = row_loader(path, 0, 1, monkeypatch, batch_size=3)
    assert resume_position(info.dataloader, info.position, EPOCH, 2, saved, same_layout=False) == 15 - (45 - 16) // 3
    rest, positions = [], []
    for _, _, ids in train(info):
        rest += ids
        positions.append(info.position.tensors())
    assert len(rest) == len(set(rest)) == 27 and not set(rest) & set(seen)
    assert len(list(train(info, EPOCH + 1))) == 15, "the next epoch is a whole one"
    info = row_loader(path, 0, 1, monkeypatch, batch_size=3)
    assert resume_position(info.dataloader, info.position, EPOCH, 8, [positions[1]], same_layout=True) == 8
    last = [id_ for _, _, ids in train(info) for id_ in ids]
    assert len(last) == len(set(last)) == 21 and not set(last) & {*seen, *rest[:6]}


def test_rows_on_another_layout_with_accumulation(tmp_path, as_rank, monkeypatch):
    """Whole steps, and on every rank the same number of them: 29 rows are left, 7 batches of 2 on 2 ranks."""
    path = make_csv(tmp_path, rows=45)
    saved = DataPosition(None, 45, 4, 0)
    saved.record(torch.arange(16), [])
    for rank in range(2):
        as_rank(rank, 2)
        info = row_loader(path, rank, 2, monkeypatch, batch_size=2)
        assert info.dataloader.num_batches == 11
        assert resume_position(info.dataloader, info.position, EPOCH, 4, [saved.tensors()], False, accum_freq=3) == 6
        assert len(list(train(info, rank=rank))) == 5


@pytest.mark.parametrize("kind", ["shards", "rows"])
def test_augmentations_leave_the_models_generators_alone(kind, tmp_path, monkeypatch):
    """Without workers the data and the model share a process; dropout must not depend on what was loaded."""
    drawn = []
    for number in (1, 3):
        if kind == "rows":
            info = row_loader(make_csv(tmp_path, rows=12), 0, 1, monkeypatch)
        else:
            info = shard_loader(shards(tmp_path))
        batches = train(info)
        for _ in range(number):
            next(batches)
        drawn.append([torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()])
    assert drawn[0] == drawn[1]


def test_a_repeated_sample_is_augmented_anew(tmp_path):
    info = shard_loader(shards(tmp_path, [4]), dataset_resampled=True, train_num_samples=32)
    looks = Counter(tuple(image) for images, _, _ in train(info) for image in images)
    assert len(looks) == 32


def test_the_tensors_of_a_large_data_set():
    """Only blocks with seen samples are stored, later batches do not change them, and the ranks' parts are joined."""
    num_samples = 5 * BLOCK + 77
    ids = [torch.tensor([3, BLOCK - 1, 4 * BLOCK]), torch.tensor([2 * BLOCK, num_samples - 1])]
    saved = []
    for of_rank in ids:
        position = DataPosition(None, num_samples, 4, 2)
        position.start_epoch(EPOCH)
        position.record(of_rank, torch.tensor([0, 5, 1, 6]))
        saved.append(position.tensors())
        position.record(torch.tensor([BLOCK + 1]), torch.tensor([0, 3]))
    assert [tensors["seen_bits"].shape for tensors in saved] == [(2, BLOCK // 8)] * 2
    joined = SeenSamples(num_samples, saved)
    assert set(range(num_samples)) - set(joined.missing(range(num_samples)).tolist()) == set(torch.cat(ids).tolist())
    assert len(joined) == 5 and joined.missing(range(2, 5)).tolist() == [0, 2]
    assert saved[0]["workers"].tolist() == [[0, 5], [0, 0]] and saved[0]["finished"].tolist() == [1, 6]

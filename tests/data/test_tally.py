"""Counts of what the data workers leave out: added up over workers and ranks, told in a line, bounded."""

import logging

import pytest

from open_clip_train_fastclip.data import tally as tally_module
from open_clip_train_fastclip.data.tally import Counts, Tally, why_unusable
from open_clip_train_fastclip.errors import UserError


@pytest.fixture
def as_worker(monkeypatch):
    """A function that makes this process one of a loader's workers."""

    class Info:
        def __init__(self, number):
            self.id, self.num_workers = number, 2

    return lambda number: monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: Info(number))


@pytest.mark.parametrize(
    ("endings", "why"),
    [
        (["gif", "txt"], "without jpg, png, jpeg or webp (gif, txt found)"),
        (["jpg", "cls"], "without txt (cls, jpg found)"),
        (["input.jpg"], "without txt and without jpg, png, jpeg or webp (input.jpg found)"),
        ([], "without txt and without jpg, png, jpeg or webp (no file found)"),
    ],
)
def test_why_a_sample_cannot_be_used(endings, why):
    sample = {"__key__": "0", "__url__": "a.tar", "__id__": 3, **dict.fromkeys(endings, b"")}
    assert why_unusable(sample) == why


def test_workers_and_ranks_add_up(as_worker):
    """The last published counts of each worker in the running epoch; the epoch before is forgotten."""
    tally = Tally(2)
    workers = [Tally.__new__(Tally) for _ in range(2)]
    for worker in workers:
        worker.__dict__.update(tally.__dict__)
    for _ in range(2):
        tally.begin()
        for number, worker in enumerate(workers):
            as_worker(number)
            worker.begin_pass()
            assert list(worker.used(range(5))) == list(range(5))
            for _ in range(number + 1):
                worker.left_out("without txt (png found)", "shard a.tar, sample 3")
            worker.end_shard(f"{number}.tar", 6, 8 + number)
            worker.reading_failed("b.tar", OSError("no network"), files=3)
            worker.publish()
    total = tally.total()
    assert (total.used, total.unused, total.shards, total.samples) == (10, 3, 2, 12)
    total.add(tally.total())
    unused, short, broken = total.findings()
    assert "6 of 26 samples that were read were not used: 6 without txt (png found); for one, shard a.tar" in unused
    assert short.startswith("2 of the shards hold another number of samples") and short.endswith(
        "0.tar (6 of 8), 1.tar (6 of 9)"
    )
    assert broken == "1 of the shards could not be read to their end: b.tar (OSError: no network)"
    tally.begin()
    assert tally.total() == Counts() and Counts().findings() == []


def test_counts_fit_whatever_is_counted():
    """Thousands of reasons and shards with names of any length: all are counted, some are named."""
    tally = Tally(0)
    tally.begin()
    tally.begin_pass()
    for number in range(3000):
        long = "\U0001f600" * 400 + str(number)
        list(tally.used([0]))
        tally.left_out(long, long)
        tally.end_shard(f"{number}{long}.tar", 1, 2)
        tally.reading_failed(f"b{number}{long}.tar", ValueError(long), files=1)
    tally.publish()
    total = tally.total()
    unused, short, broken = total.findings()
    assert total.used == total.unused == 3000 and unused.startswith("3,000 of 6,000 samples")
    assert short.startswith("3,000 of the shards") and short.endswith("and 2,990 more")
    assert broken.startswith("3,000 of the shards") and broken.endswith("and 2,990 more")


def test_a_shard_that_is_read_again_counts_once():
    tally = Tally(0)
    tally.begin()
    for _ in range(3):
        tally.begin_pass()
        tally.end_shard("a.tar", 3, 4)
        tally.end_shard("b.tar", 5, 4)
        tally.end_shard("full.tar", 4, 4)
        tally.end_shard("of unknown size.tar", 4, None)
        tally.publish()
    assert tally.total().resized == {"a.tar": [3, 4], "b.tar": [5, 4]} and tally.total().more_resized == 0


def test_a_worker_warns_ten_times(caplog):
    tally = Tally(0)
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            tally.warn(f"sample {number}")
    assert len(caplog.messages) == 10 and "only counted" in caplog.messages[-1]


def test_shards_of_which_nothing_comes():
    """So many in a row end the reading; one that can be read begins the count anew."""
    tally = Tally(0)
    tally.begin()
    tally.begin_pass()
    for number in range(3 * tally_module.MOST_UNREADABLE):
        tally.reading_failed(f"{number}.tar", OSError(5, "Input/output error"), files=0)
        if number % 5 == 0:
            tally.end_shard("good.tar", 1, 1)
    assert tally.seconds_to_wait == tally_module.MOST_SECONDS_TO_WAIT
    with pytest.raises(UserError, match="10 shards in a row could not be read, the last of them c.tar .*exit code 22"):
        for _ in range(tally_module.MOST_UNREADABLE):
            tally.reading_failed("c.tar", OSError("(('curl',), {}): exit 22 (read) {}"), files=0)


def test_reading_without_a_usable_sample_ends():
    """Where shards are drawn without end; not after a single bad shard of many samples, nor with one usable sample."""
    for used in (0, 1):
        tally = Tally(0)
        tally.begin()
        tally.begin_pass()
        list(tally.used(range(used)))
        for _ in range(50_000):
            tally.left_out("not decodable", "shard a.tar, sample 1")
        for number in range(tally_module.BARREN_SHARDS):
            tally.end_shard(f"{number}.tar", 100, None)
        if used:
            tally.left_out("not decodable", "")
            continue
        with pytest.raises(
            UserError, match="0 usable samples among the 50,001 .* 50,001 not decodable; for one, shard a"
        ):
            tally.left_out("not decodable", "")


def test_shards_that_are_all_empty():
    tally = Tally(0)
    with pytest.raises(UserError, match="0 usable samples .* they are empty"):
        for number in range(tally_module.BARREN_SHARDS):
            tally.end_shard(f"{number}.tar", 0, None)

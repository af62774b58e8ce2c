"""Counts of what the data workers leave out: added up over workers and ranks, told in a line, bounded."""

import logging

import pytest

from open_clip_train_fastclip.data import tally as tally_module
from open_clip_train_fastclip.data.tally import Counts, Tally, why_unusable
from open_clip_train_fastclip.data.tar_files import ReadUrl
from open_clip_train_fastclip.errors import UserError


@pytest.fixture
def as_worker(monkeypatch):
    """A function that makes this process one of a loader's workers."""

    class Info:
        def __init__(self, number):
            self.id, self.num_workers = number, 2

    return lambda number: monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: Info(number))


def read(tally, name, samples, recorded=None, error=None):
    """A shard is read: its files, perhaps an error, and the samples that are made of the files."""
    url = ReadUrl(name)
    if error is not None:
        tally.reading_failed(url, error, files=2 * samples)
    tally.shard_through(url)
    found = ({"__url__": url} for _ in range(samples))
    list(tally.grouped(found, {} if recorded is None else {name: recorded}))


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
            read(worker, f"{number}.tar", 6, recorded=8 + number)
            read(worker, "b.tar", 1, error=OSError("no network"))
            read(worker, "c.tar", 7, recorded=16, error=OSError("no network"))
            worker.publish()
    total = tally.total()
    assert (total.used, total.unused, total.shards, total.samples) == (10, 3, 6, 28)
    total.add(tally.total())
    unused, broken, short = total.findings()
    assert "6 of 26 samples that were read were not used: 6 without txt (png found); for one, shard a.tar" in unused
    assert short.startswith("2 of the shards hold another number of samples") and short.endswith(
        "0.tar (6 of 8), 1.tar (6 of 9)"
    )
    assert total.lost == 4 * 9 and broken == (
        "2 of the shards could not be read to their end, with which 36 samples are lost: b.tar (1 samples, OSError: no "
        "network), c.tar (7 of 16 samples, OSError: no network)"
    )
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
        read(tally, f"{number}{long}.tar", 1, recorded=2)
        read(tally, f"b{number}{long}.tar", 1, error=ValueError(long))
    tally.publish()
    total = tally.total()
    unused, broken, short = total.findings()
    assert total.used == total.unused == 3000 and unused.startswith("3,000 of 6,000 samples")
    assert short.startswith("3,000 of the shards") and short.endswith("and 2,990 more")
    assert broken.startswith("3,000 of the shards") and broken.endswith("and 2,990 more")


def test_a_shard_that_is_read_again_counts_once():
    tally = Tally(0)
    tally.begin()
    for _ in range(3):
        tally.begin_pass()
        read(tally, "a.tar", 3, recorded=4)
        read(tally, "b.tar", 5, recorded=4)
        read(tally, "full.tar", 4, recorded=4)
        read(tally, "of unknown size.tar", 4)
        tally.publish()
    assert tally.total().resized == {"a.tar": [3, 4], "b.tar": [5, 4]} and tally.total().more_resized == 0


def test_what_a_broken_shard_loses_counts_once_an_epoch():
    tally = Tally(0)
    for _ in range(2):
        tally.begin()
        for _ in range(3):
            tally.begin_pass()
            for number in range(20):
                read(tally, f"{number}.tar", 3, recorded=16, error=OSError("cut"))
            tally.publish()
        assert tally.total().lost == 20 * 13


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
        read(tally, f"{number}.tar", 0, error=OSError(5, "Input/output error"))
        if number % 5 == 0:
            read(tally, "good.tar", 1)
    assert tally.seconds_to_wait("new.tar") == tally_module.MOST_SECONDS_TO_WAIT
    assert tally.seconds_to_wait("7.tar") is None, "a shard that failed before is not waited for again"
    with pytest.raises(UserError, match="10 shards in a row could not be read, the last of them c.tar .*exit code 22"):
        for _ in range(tally_module.MOST_UNREADABLE):
            read(tally, "c.tar", 0, error=OSError("(('curl',), {}): exit 22 (read) {}"))


@pytest.mark.parametrize("used", [0, 1])
def test_reading_without_a_usable_sample_ends(used):
    """Where shards are drawn without end; not after a bad shard of many samples, nor many small ones, nor with one
    usable sample."""
    tally = Tally(0)
    tally.begin()
    tally.begin_pass()
    list(tally.used(range(used)))
    for _ in range(50_000):
        tally.left_out("not decodable", "shard a.tar, sample 1")
    for number in range(tally_module.BARREN_SHARDS):
        read(tally, f"{number}.tar", 100)
    if used:
        tally.left_out("not decodable", "")
        return
    with pytest.raises(UserError, match="0 usable samples among the 50,001 .* 50,001 not decodable; for one, shard a"):
        tally.left_out("not decodable", "")


def test_many_shards_of_few_unusable_samples_are_not_the_end():
    tally = Tally(0)
    tally.begin()
    tally.begin_pass()
    for number in range(5000):
        read(tally, f"{number}.tar", 1)
    for _ in range(tally_module.BARREN_SAMPLES - 1):
        tally.left_out("not decodable", "shard a.tar, sample 1")
    with pytest.raises(UserError, match="0 usable samples among the 1,000"):
        tally.left_out("not decodable", "")


def test_shards_that_are_all_empty():
    """Those that are empty behind one with samples end nothing."""
    tally = Tally(0)
    with pytest.raises(UserError, match="0 usable samples .* they are empty"):
        for number in range(tally_module.EMPTY_SHARDS):
            read(tally, f"{number}.tar", 0)
    tally = Tally(0)
    read(tally, "good.tar", 1)
    for number in range(tally_module.EMPTY_SHARDS):
        read(tally, f"{number}.tar", 0)


def test_a_sample_that_comes_shards_later_counts_for_its_own():
    """OpenCLIP's stage passes a sample on when the next one begins, and these shards hold none."""
    tally = Tally(0)
    tally.begin()
    tally.begin_pass()
    a, empty, b = (ReadUrl(name) for name in ("a.tar", "empty.tar", "a.tar"))

    def found():
        tally.shard_through(a)
        tally.shard_through(empty)
        yield {"__url__": a}
        yield {"__url__": b}
        tally.shard_through(b)
        yield {"__url__": b}

    list(tally.grouped(found(), {"a.tar": 2, "empty.tar": 3}))
    tally.publish()
    assert (a.samples, empty.samples, b.samples) == (1, 0, 2)
    assert tally.total().resized == {"a.tar": [1, 2], "empty.tar": [0, 3]}

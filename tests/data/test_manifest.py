"""Where the sizes of shards come from, what is checked before anything is read, and that all ranks agree."""

import gzip
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from make_data import make_shards, sample_files, write_tar
from open_clip_train import data as openclip_data
from ranks import run_ranks

from open_clip_train_fastclip import shard_sizes
from open_clip_train_fastclip.data import manifest as manifest_module
from open_clip_train_fastclip.data import tar_scan
from open_clip_train_fastclip.data.shard_list import check_shards, check_shards_for_workers
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.openclip.pipeline import manifest_of

CACHE = tar_scan.FILE_NAME


@pytest.fixture
def scanned(monkeypatch):
    """The names of the shards that were scanned, in a list that can be cleared."""
    names = []

    scan_shard = tar_scan.scan_shard

    def recording(path, group):
        names.append(Path(path).name)
        return scan_shard(path, group)

    monkeypatch.setattr(tar_scan, "scan_shard", recording)
    return names


@pytest.fixture
def read_only(monkeypatch):
    """A function that makes a folder read-only, also for root."""

    def make(folder):
        write_text = Path.write_text

        def refuse(path, *args, **kwargs):
            if path.parent == Path(folder):
                raise PermissionError(13, "Permission denied")
            return write_text(path, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", refuse)

    return make


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_sizes(folder, sizes):
    Path(folder, "sizes.json").write_text(sizes if isinstance(sizes, str) else json.dumps(sizes))


# ---- the order of the sources


def test_sizes_json_comes_first(tmp_path, scanned):
    data = make_shards(tmp_path, shards=2, per_shard=4)
    write_sizes(tmp_path, {"00000.tar": 9, "00001.tar": "7", "00002.tar": 1})
    (tmp_path / "00000_stats.json").write_text('{"successes": 8}')
    manifest = manifest_of(data, samples_per_shard=5)
    assert manifest.counts == (9, 7) and scanned == []
    assert manifest.offsets == {f"{tmp_path}/00000.tar": 0, f"{tmp_path}/00001.tar": 9}


def test_then_the_statistics_of_img2dataset(tmp_path, scanned):
    data = make_shards(tmp_path, shards=3, per_shard=4)
    (tmp_path / "00000_stats.json").write_text('{"count": 10, "successes": 8, "status_dict": {}}')
    (tmp_path / "00001_stats.json").write_text('{"count": 10')
    assert manifest_of(data).counts == (8, 4, 4) and sorted(scanned) == ["00001.tar", "00002.tar"]


def test_then_a_scan_which_is_kept(tmp_path, scanned):
    data = make_shards(tmp_path, per_shard=[3, 0, 5])
    first = manifest_of(data)
    assert first.counts == (3, 0, 5) and len(scanned) == 3
    scanned.clear()
    assert manifest_of(data) == first and manifest_of(data).identity == first.identity and scanned == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", CACHE]


def test_samples_per_shard_is_for_remote_shards(tmp_path, scanned):
    data = make_shards(tmp_path, shards=2, per_shard=4)
    remote = f"pipe:cat {tmp_path}/00001.tar"
    assert manifest_of(f"{tmp_path}/00000.tar::{remote}", samples_per_shard=10).counts == (4, 10)
    message = refusal(manifest_of, f"{data}::{remote}")
    assert remote in message and "--samples-per-shard" in message and "sizes.json" in message


def test_a_shard_that_sizes_json_lacks_has_the_next_source(tmp_path, scanned):
    data = make_shards(tmp_path, shards=3, per_shard=4)
    # only file names count; stock OpenCLIP looks them up so, too
    write_sizes(tmp_path, {"00000.tar": 9, "/elsewhere/00001.tar": 7, "other.tar": 3})
    assert manifest_of(data).counts == (9, 4, 4)


@pytest.mark.parametrize("sizes", ["{", "[1, 2]", '{"00000.tar": -1}', '{"00000.tar": null}', '{"00000.tar": 2.5}'])
def test_malformed_sizes_json(sizes, tmp_path):
    data = make_shards(tmp_path, shards=1, per_shard=4)
    write_sizes(tmp_path, sizes)
    message = refusal(manifest_of, data)
    assert f"{tmp_path}/sizes.json" in message and "remove it" in message


def test_each_folder_has_its_own_sources(tmp_path, scanned):
    sources = [make_shards(tmp_path / name, shards=2, per_shard=4) for name in "abc"]
    write_sizes(tmp_path / "b", {"00000.tar": 6, "00001.tar": 7})
    manifest = manifest_of("::".join(sources))
    assert manifest.counts == (4, 4, 6, 7, 4, 4) and len(scanned) == 4
    assert [(tmp_path / name / CACHE).exists() for name in "abc"] == [True, False, True]


def test_sizes_of_remote_shards(monkeypatch):
    """sizes.json is fetched from beside them; one that is not there, or a page that says so, is none."""
    fetched = []

    def fetch(place):
        fetched.append(place)
        if "sizes.json" in place and "/a/" in place:
            return io.BytesIO(b'{"0.tar": 3, "1.tar": 4}')
        if "/b/" in place:
            return io.BytesIO(b"<html>not found</html>")
        raise OSError(22, "exit status of curl")

    monkeypatch.setattr(manifest_module, "gopen", fetch)
    data = "https://host/a/{0..1}.tar::https://host/b/0.tar::https://host/c/0.tar::https://host/a/0.tar?key=5"
    assert manifest_of(data, samples_per_shard=9).counts == (3, 4, 9, 9, 9)
    assert fetched == [f"https://host/{folder}/sizes.json" for folder in "abc"]


def test_shards_in_the_current_folder(tmp_path, monkeypatch, scanned):
    make_shards(tmp_path, shards=2, per_shard=4)
    monkeypatch.chdir(tmp_path)
    assert manifest_of("{00000..00001}.tar").counts == (4, 4) and (tmp_path / CACHE).exists()
    scanned.clear()
    assert manifest_of("{00000..00001}.tar").counts == (4, 4) and scanned == []
    write_sizes(tmp_path, {"00000.tar": 1, "00001.tar": 2})
    assert manifest_of("file:{00000..00001}.tar").counts == (1, 2)


def test_an_empty_data_set(tmp_path):
    assert "hold no sample" in refusal(manifest_of, make_shards(tmp_path, per_shard=[0, 0]))


def test_repeated_shards(tmp_path):
    data = make_shards(tmp_path, per_shard=[3, 5])
    manifest = manifest_of(f"{data}::{tmp_path}/00001.tar")
    assert manifest.counts == (3, 5) and len(manifest.listed) == 3
    assert manifest.num_samples == 8 and manifest.num_listed_samples == 13


# ---- the hash


def test_the_hash_is_of_names_and_sizes_in_order(tmp_path):
    here = manifest_of(make_shards(tmp_path / "a", per_shard=[3, 5])).identity.hash
    assert re.fullmatch("[0-9a-f]{64}", here)
    assert manifest_of(make_shards(tmp_path / "staged" / "b", per_shard=[3, 5])).identity.hash == here
    assert manifest_of(make_shards(tmp_path / "c", per_shard=[5, 3])).identity.hash != here
    assert manifest_of(f"{tmp_path}/a/00001.tar::{tmp_path}/a/00000.tar").identity.hash != here
    assert manifest_of(f"{tmp_path}/a/00000.tar").identity.hash != here
    write_sizes(tmp_path / "a", {"00000.tar": 3, "00001.tar": 5})
    assert manifest_of(f"{tmp_path}/a/{{00000..00001}}.tar").identity.hash == here  # the sizes' source does not matter


def test_the_hash_of_fetched_shards(tmp_path):
    make_shards(tmp_path, shards=1, per_shard=4)
    staged = manifest_of(f"{tmp_path}/00000.tar").identity.hash
    assert manifest_of(f"pipe:cat {tmp_path}/00000.tar -", samples_per_shard=4).identity.hash == staged


# ---- the scan counts what the loader yields


def odd_files():
    """Everything by which files are grouped or left out."""
    return [
        *sample_files(0, "a/x", ["png", "txt"]),
        ("a/x.png", b"the same ending again: a new sample"),
        ("a/x.TXT", b"of the same sample"),
        *sample_files(1, "b/x", ["png", "txt"]),
        ("no ending", b"belongs to no sample"),
        ("b/x.json", b"{}"),
        ("__index__", b"metadata"),
        ("__meta__/c.png", b"metadata"),
        ("__c__.png", b"a sample"),
        ("folder/__d__/e.png", b"a sample"),
        ("f.seg.png", b"a sample"),
        ("f.txt", b"of the same sample"),
        ("g", b""),
        ("h.__bad__", b"a sample that OpenCLIP drops"),
        ("i.png", b""),
        ("a-very-long-name" * 20 + ".png", b"in two headers"),
    ]


@pytest.mark.parametrize("compressed", [False, True])
def test_the_scan_counts_what_the_loader_yields(compressed, tmp_path):
    path = write_tar(tmp_path / "0.tar", odd_files())
    if compressed:
        packed = tmp_path / "0.tar.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    yielded = list(openclip_data.tarfile_to_samples_nothrow(iter([{"url": str(path)}])))
    assert manifest_of(str(path)).counts == (len(yielded),) and len(yielded) == 8


def test_folders_and_links_are_no_samples(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("a.d", tarfile.DIRTYPE), ("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "d.png"
            tar.addfile(entry)
        tar.addfile(tarfile.TarInfo("d.png"))
    yielded = list(openclip_data.tarfile_to_samples_nothrow(iter([{"url": f"{tmp_path}/0.tar"}])))
    assert manifest_of(f"{tmp_path}/0.tar").counts == (len(yielded),) == (1,)


# ---- the cache


def set_time(path, mtime_ns):
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_a_changed_shard_is_scanned_again(tmp_path, scanned):
    data = make_shards(tmp_path, per_shard=[4, 4, 4])
    manifest_of(data)
    scanned.clear()
    write_tar(tmp_path / "00001.tar", [f for n in range(6) for f in sample_files(n, f"{n}")])
    set_time(tmp_path / "00002.tar", os.stat(tmp_path / "00002.tar").st_mtime_ns + 1)
    assert manifest_of(data).counts == (4, 6, 4) and sorted(scanned) == ["00001.tar", "00002.tar"]
    scanned.clear()
    assert manifest_of(data).counts == (4, 6, 4) and scanned == []
    time = os.stat(tmp_path / "00000.tar").st_mtime_ns
    write_tar(tmp_path / "00000.tar", [f for n in range(9) for f in sample_files(n, f"{n}")])
    set_time(tmp_path / "00000.tar", time)
    assert manifest_of(data).counts == (9, 6, 4)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[1]", "3", '{"00000.tar": 4, "00001.tar": [4]}', '{"00000.tar": [4, "x", null]}', "\udcff\udcfe"],
)
def test_a_damaged_cache_is_as_good_as_none(damage, tmp_path, scanned):
    data = make_shards(tmp_path, per_shard=[4, 4])
    (tmp_path / CACHE).write_bytes(damage.encode(errors="surrogateescape"))
    assert manifest_of(data).counts == (4, 4) and len(scanned) == 2
    scanned.clear()
    assert manifest_of(data).counts == (4, 4) and scanned == []


@pytest.mark.parametrize("count", ['"4"', "null", "true", "4.0", "[4]"])
def test_a_damaged_count(count, tmp_path, scanned):
    shard = write_tar(tmp_path / "0.tar", sample_files(0, "0"))
    stat = os.stat(shard)
    (tmp_path / CACHE).write_text(f'{{"0.tar": [{count}, {stat.st_size}, {stat.st_mtime_ns}]}}')
    assert manifest_of(str(shard)).counts == (1,) and scanned == ["0.tar"]


def test_a_later_scan_keeps_what_an_earlier_one_found(tmp_path, scanned):
    make_shards(tmp_path, per_shard=[4, 4])
    for _ in range(2):
        for shard in ("00000.tar", "00001.tar"):
            manifest_of(f"{tmp_path}/{shard}")
    assert scanned == ["00000.tar", "00001.tar"]


def test_a_read_only_data_folder(tmp_path, scanned, read_only, caplog):
    sources = [make_shards(tmp_path / name, per_shard=counts) for name, counts in (("a", [3, 4]), ("b", [5, 6]))]
    data, logs = "::".join(sources), tmp_path / "logs"
    read_only(tmp_path / "a")
    assert manifest_of(data).counts == (3, 4, 5, 6) and len(scanned) == 4
    assert f"{tmp_path}/a cannot be kept" in caplog.text and f"{tmp_path}/b" not in caplog.text
    scanned.clear()
    assert manifest_of(data, cache_dir=logs).counts == (3, 4, 5, 6) and scanned == ["00000.tar", "00001.tar"]
    assert len(list(logs.iterdir())) == 1 and not list((tmp_path / "a").glob("*.json*"))
    scanned.clear()
    assert manifest_of(data, cache_dir=logs).counts == (3, 4, 5, 6) and scanned == []


def test_a_stale_cache_in_a_read_only_folder(tmp_path, scanned, read_only):
    data = make_shards(tmp_path / "a", per_shard=[4])
    manifest_of(data)
    write_tar(tmp_path / "a" / "00000.tar", sample_files(0, "0"))
    read_only(tmp_path / "a")
    for _ in range(2):
        assert manifest_of(data, cache_dir=tmp_path / "logs").counts == (1,)
    assert scanned == ["00000.tar"] * 2


def test_the_cache_is_replaced_at_once(tmp_path, monkeypatch):
    """Whoever reads while it is written finds the old file, and a failed write leaves nothing behind."""
    data = make_shards(tmp_path, per_shard=[4, 4])
    manifest_of(f"{tmp_path}/00000.tar")
    before = (tmp_path / CACHE).read_text()

    def fail(partial, target):
        assert Path(target).read_text() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert manifest_of(data).counts == (4, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.tar", "00001.tar", CACHE]
    assert (tmp_path / CACHE).read_text() == before


# ---- what is refused


def test_a_missing_shard(tmp_path):
    make_shards(tmp_path, shards=2, per_shard=4)
    message = refusal(manifest_of, f"{tmp_path}/{{00000..00004}}.tar")
    assert f"{tmp_path}/00002.tar does not exist" in message and "of 5 shards, 3 cannot be used" in message


@pytest.mark.parametrize(
    ("name", "cure"),
    [("~/data/00000.tar", "~"), ("/data/*.tar", "{00000..00331}"), ("/none/{0..3}.tar", "correct its name"), ("", "")],
)
def test_names_that_match_nothing(name, cure):
    message = refusal(check_shards, name)
    assert "does not exist" in message and cure in message


@pytest.mark.parametrize("name", ["/data/{0..3.tar", "/data/${FASTCLIP_NO_SUCH}/0.tar"])
def test_names_that_cannot_be_expanded(name):
    assert name in refusal(check_shards, name)


def test_addresses_that_webdataset_cannot_open():
    message = refusal(check_shards, "s3://bucket/{0..1}.tar")
    assert "s3://" in message and "pipe:aws s3 cp s3://bucket/0.tar -" in message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda tar: b"<html>no tar at all</html>" * 100, "no tar"),
        (lambda tar: b"", "no tar"),
        (lambda tar: bytes(100_000), "no tar"),
        (lambda tar: tar[: len(tar) // 2], "cut off"),
        (lambda tar: tar[:1024], "cut off"),
        (lambda tar: tar[: 8 * 512 + 100], "cut off"),
        (lambda tar: tar.rstrip(b"\0"), "cut off"),
        (lambda tar: gzip.compress(os.urandom(5000)), "cannot be read"),
        (lambda tar: gzip.compress(tar)[:400], "cannot be read to its end"),
    ],
    ids=["html", "empty", "zeros", "half", "two blocks", "inside a file", "no end", "gzip of noise", "half a gzip"],
)
def test_damaged_shards(content, word, tmp_path):
    data = make_shards(tmp_path, shards=3, per_shard=8)
    shard = tmp_path / "00001.tar"
    shard.write_bytes(content(shard.read_bytes()))
    message = refusal(manifest_of, data)
    assert str(shard) in message and word in message and "leave it out" in message


@pytest.mark.parametrize(("size", "word"), [(4000, "cut off"), (4096, "cannot be read to its end")])
def test_a_shard_cut_off_where_it_holds_zeros(size, word, tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("0.txt", bytes(9000))])
    shard.write_bytes(shard.read_bytes()[:size])
    assert word in refusal(manifest_of, str(shard))


def test_local_shards_are_checked_though_their_sizes_are_known(tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=8, sizes=True)
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:4096])
    assert "cut off" in refusal(manifest_of, data)
    assert "cut off" in refusal(check_shards, data)


def test_a_folder_in_place_of_a_shard(tmp_path):
    (tmp_path / "0.tar").mkdir()
    assert "cannot be read (Is a directory)" in refusal(check_shards, f"{tmp_path}/0.tar")


@pytest.mark.parametrize(
    ("shards", "workers", "ranks", "cure"),
    [
        (8, 4, 2, None),
        (7, 4, 2, "--workers 3"),
        (4, 5, 1, "--workers 4"),
        (1, 0, 1, None),
        (1, 0, 2, "at most 1"),
        (3, 8, 4, "at most 3"),
        (9, 0, 4, None),
    ],
)
def test_shards_for_workers(shards, workers, ranks, cure):
    check_shards_for_workers(shards, workers, ranks, resampled=True)
    if cure is None:
        check_shards_for_workers(shards, workers, ranks, resampled=False)
    else:
        assert cure in refusal(check_shards_for_workers, shards, workers, ranks, resampled=False)


# ---- several ranks


def test_two_ranks_split_the_scan_and_agree(tmp_path, scanned):
    counts = [4, 2, 3, 7, 1]
    data = make_shards(tmp_path, per_shard=counts)

    def on_rank():
        return manifest_of(data), list(scanned)

    (first, of_rank_0), (second, of_rank_1) = run_ranks(2, on_rank)
    assert first == second and first.counts == tuple(counts)
    assert sorted(of_rank_0) == ["00000.tar", "00002.tar", "00004.tar"]
    assert sorted(of_rank_1) == ["00001.tar", "00003.tar"]
    assert manifest_of(data) == first and scanned == [], "rank 0 kept what both found"


@pytest.mark.parametrize("case", ["cut shard of rank 1", "sizes.json", "remote", "empty"])
def test_an_error_of_one_rank_ends_all_with_the_same_words(case, tmp_path):
    data = make_shards(tmp_path, per_shard=[4, 4] if case != "empty" else [0, 0])
    if case == "cut shard of rank 1":
        (tmp_path / "00001.tar").write_bytes((tmp_path / "00001.tar").read_bytes()[:4096])
    elif case == "sizes.json":
        write_sizes(tmp_path, "{")
    elif case == "remote":
        data += f"::pipe:cat {tmp_path}/00001.tar"

    def on_rank():
        with pytest.raises(UserError) as error:
            manifest_of(data)
        dist.barrier()
        return str(error.value), error.value.on_all_ranks

    first, second = run_ranks(2, on_rank)
    assert first == second and first[1]


# ---- what is shown


def test_progress_is_lines_without_a_terminal_and_a_bar_on_one(tmp_path, capsys, monkeypatch):
    data = make_shards(tmp_path, per_shard=[4] * 3)
    manifest_of(data)
    assert capsys.readouterr().err == ""
    (tmp_path / CACHE).unlink()
    manifest_of(data, progress=True)
    assert capsys.readouterr().err == "counting samples: 3 of 3 shards\n"
    (tmp_path / CACHE).unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    manifest_of(data, progress=True)
    assert re.search(r"counting samples: 100%\|.*3/3", capsys.readouterr().err)


def test_the_scan_can_be_run_before(tmp_path, capsys, scanned):
    data = make_shards(tmp_path, per_shard=[4, 5])
    assert shard_sizes.main([data, "--logs", str(tmp_path / "logs")]) == 0
    assert capsys.readouterr().out == "2 shards, 9 samples\n"
    scanned.clear()
    assert manifest_of(data).num_samples == 9 and scanned == []
    assert shard_sizes.main([f"{tmp_path}/none.tar"]) == 2
    assert "none.tar does not exist" in capsys.readouterr().err

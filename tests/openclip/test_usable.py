"""What of the shards is not used is told in numbers, ends the run where it is too much, and changes no batch."""

import gzip
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from cli import TINY, run_cli, run_forked
from loaders import numbered_loader, openclip_args, preprocess, seeded_stock_loader, stock_loader, tokenizer
from make_data import caption_of, make_csv, make_shards, number_of_image, sample_files, write_tar
from open_clip_train import data as openclip_data

from open_clip_train_fastclip import preflight
from open_clip_train_fastclip.data import tally as tally_module
from open_clip_train_fastclip.data import tar_files
from open_clip_train_fastclip.data.checked_loader import CheckedLoader
from open_clip_train_fastclip.errors import UserError, user_message
from open_clip_train_fastclip.openclip.pipeline import manifest_of
from open_clip_train_fastclip.openclip.usable import keep_shards, watch

PAIR = ("png", "txt")


def watched(info, **changed):
    """OpenCLIP's DataInfo of training data with a tally, as --loss clip has it."""
    flags = {
        "loss": "clip",
        "save_every": None,
        "max_unusable": 0.05,
        "skip_broken_shards": False,
        "workers": 0,
        "dist_timeout": 60,
    }
    args = Namespace(**{**flags, "train_num_samples": None, "train_data": "x", "dataset_type": "webdataset", **changed})
    watch({"train": info}, args, None, [])
    return info


def evaluation_loader(data, workers=0):
    args = openclip_args(None, val_data=data, val_num_samples=None, workers=workers)
    info = openclip_data.get_wds_dataset(args, preprocess, is_train=False, tokenizer=tokenizer)
    watch({"val": info}, args, None, openclip_data.expand_urls(data)[0])
    return info


def numbers(batches):
    """The numbers that images encode; captions must say the same."""
    found = [(number_of_image(image), int(text)) for b in batches for image, text in zip(b[0], b[1], strict=True)]
    assert all(image == caption for image, caption in found)
    return sorted(image for image, _ in found)


def gif_and_caption(number, key):
    return [(f"{key}.gif", b"GIF89a"), (f"{key}.txt", caption_of(number).encode())]


def mixed_shards(folder, unusable, shards=4, per_shard=16):
    """The pattern of shards in which samples with numbers in `unusable` have a gif in place of a png."""
    for shard in range(shards):
        ids = range(shard * per_shard, (shard + 1) * per_shard)
        files = (gif_and_caption(n, str(n)) if n in unusable else sample_files(n, str(n), PAIR) for n in ids)
        write_tar(folder / f"{shard:05d}.tar", [file for sample in files for file in sample])
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def errors(run):
    return [line for output in run.output for line in output.splitlines() if "fastclip: error" in line]


def refused(run, *words):
    """Every rank ends with exit code 2, and there is one line with these words."""
    assert set(run.codes) == {2} and "Traceback" not in str(run), run
    assert len(errors(run)) == 1 and all(word in errors(run)[0] for word in words), run


def flags_of(loss, data, logs, *extra):
    return [*TINY, "--loss", loss, "--train-data", data, "--logs", logs, "--name", "run", *extra]


def warned(run):
    return [line for line in run.output[0].splitlines() if "WARNING" in line]


# ---- the batches


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_of_openclips_own_losses_do_not_change(workers, resampled, tmp_path):
    data = mixed_shards(tmp_path, unusable={3, 21, 22})
    settings = {"workers": workers, "dataset_resampled": resampled, "train_num_samples": 48}
    stock, ours = seeded_stock_loader(data, **settings), seeded_stock_loader(data, **settings)
    watched(ours, workers=workers, max_unusable=0.2)
    for epoch in range(2):
        batches = []
        for info in (stock, ours):
            info.set_epoch(epoch)
            torch.manual_seed(epoch)
            batches.append([tensor for batch in info.dataloader for tensor in batch])
        assert len(batches[0]) == len(batches[1]) > 0 and all(map(torch.equal, *batches))


def join(path, *parts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return str(path)


def test_tars_joined_by_cat_are_read_to_their_end(tmp_path):
    """Also with an empty tar between them; by every loader, and the ids are those of the whole."""
    parts = []
    for part in (range(4), (), range(8, 12)):
        files = [file for n in part for file in sample_files(n, str(n), PAIR)]
        parts.append(write_tar(tmp_path / str(len(parts)), files))
    data = join(tmp_path / "joined.tar", *parts)
    expected = [*range(4), *range(8, 12)]
    assert manifest_of(data).counts == (8,)
    info = numbered_loader(data)
    batches = list(info.dataloader)
    assert numbers(batches) == expected and sorted(torch.cat([b[2] for b in batches]).tolist()) == list(range(8))
    assert numbers(watched(stock_loader(data, train_num_samples=8)).dataloader) == expected
    assert numbers(evaluation_loader(data).dataloader) == expected


def damaged(path):
    """A tar of eight samples whose sixth has a damaged header."""
    write_tar(path, [f for n in range(8) for f in sample_files(n, f"{n}", PAIR)])
    content = bytearray(path.read_bytes())
    at = content.index(b"5.png")
    content[at : at + 100] = b"x" * 100
    path.write_bytes(content)
    return str(path)


def test_a_shard_that_is_damaged_inside_is_no_short_one(tmp_path, caplog):
    """tarfile takes a damaged header for the end."""
    data = damaged(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"0.tar cannot be read to its end \(ReadError: damaged inside, bad checksum\)"):
        manifest_of(data)
    url = f"pipe:cat {data}"
    info = numbered_loader(url, manifest_of(url, samples_per_shard=9), train_num_samples=4, batch_size=1)
    assert set(numbers(info.dataloader)) <= set(range(5))
    assert numbers(evaluation_loader(data).dataloader) == list(range(5))
    assert f"shard {data}: reading failed (ReadError: damaged inside" in caplog.text
    assert "--val-data: 1 of the shards could not be read to their end" in caplog.text


@pytest.mark.parametrize("cut", ["between files", "inside a file"])
def test_a_fetched_shard_that_is_cut_off_is_told(cut, tmp_path, caplog):
    path = write_tar(tmp_path / "0.tar", [f for n in range(8) for f in sample_files(n, f"{n}", PAIR)])
    size = path.read_bytes().index(b"5.png") + (700 if cut == "inside a file" else 0)
    assert numbers(evaluation_loader(f"pipe:head -c {size} {path}").dataloader) == list(range(5))
    assert "reading failed (ReadError: " in caplog.text


# ---- nothing usable


def apart(folder):
    files = [sample_files(n, f"{n}", PAIR) for n in range(8)]
    return str(write_tar(folder / "0.tar", [image for image, _ in files] + [caption for _, caption in files]))


def of_each(folder, files_of):
    return str(write_tar(folder / "0.tar", [file for n in range(8) for file in files_of(n)]))


UNUSABLE = {
    "gif": (lambda folder: of_each(folder, lambda n: gif_and_caption(n, n)), "(gif, txt found)"),
    "names of inputs": (
        lambda folder: of_each(folder, lambda n: [(f"{n}.input.jpg", b"x"), (f"{n}.outputs.txt", b"x")]),
        "(input.jpg, outputs.txt found)",
    ),
    "a class": (lambda folder: of_each(folder, lambda n: [(f"{n}.jpg", b"x"), (f"{n}.cls", b"1")]), "(cls, jpg found)"),
    "a dot in the key": (
        lambda folder: of_each(folder, lambda n: [(f"{n}_1.5s.png", b"x"), (f"{n}_1.5s.txt", b"x")]),
        "(5s.png, 5s.txt found)",
    ),
    "apart": (apart, "8 without jpg, png, jpeg or webp (txt found), 8 without txt (png found)"),
    "no images": (lambda folder: of_each(folder, lambda n: [(f"{n}.png", b"x"), (f"{n}.txt", b"x")]), "not decodable"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_no_usable_sample_says_why(kind, tmp_path):
    """With ids, with OpenCLIP's own losses, and in evaluation."""
    make, why = UNUSABLE[kind]
    data = make(tmp_path)
    loaders = [
        lambda: numbered_loader(data),
        lambda: watched(stock_loader(data, train_num_samples=8)),
        lambda: evaluation_loader(data),
    ]
    for make_loader in loaders:
        with pytest.raises(UserError) as error:
            list(make_loader().dataloader)
        message = user_message(error.value)
        assert why in message and re.search(f"for one, shard {data}, sample \\d", message), message
        assert ("dot and have these endings" in message) == (kind != "no images")


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
@pytest.mark.parametrize("resampled", [(), ("--dataset-resampled", "--train-num-samples", 32)], ids=["", "resampled"])
def test_a_source_without_a_batch_ends_the_run(loss, resampled, tmp_path):
    data = mixed_shards(tmp_path / "data", unusable=range(64))
    run = run_cli(flags_of(loss, data, tmp_path, *resampled), tmp_path / "out", ranks=2, timeout=60)
    refused(run, "0 usable samples", "(gif, txt found)")


@pytest.mark.parametrize("files", [[], [(f"file{n}", b"x") for n in range(3)]], ids=["empty", "without endings"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_shards_that_make_no_sample_end_the_run(loss, files, tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"{shard:05d}.tar", files)
    data = f"{tmp_path}/{{00000..00003}}.tar"
    flags = flags_of(loss, data, tmp_path, "--dataset-resampled", "--train-num-samples", 64)
    refused(run_cli(flags, tmp_path / "out", timeout=60), "0 usable samples", "they are empty")


@pytest.mark.parametrize(("loss", "workers"), [("clip", 0), ("siglip", 1), ("fastclip-v3", 2)])
def test_one_rank_without_a_batch_ends_all(loss, workers, tmp_path):
    """The ranks take every other shard of the order, here one of two or four."""
    shards = 2 * max(1, workers)
    data = mixed_shards(tmp_path / "data", unusable=range(16 * shards - 16, 16 * shards), shards=shards)
    flags = flags_of(loss, data, tmp_path, "--workers", workers, "--max-unusable", 1)
    refused(run_cli(flags, tmp_path / "out", ranks=2, timeout=60), "0 usable samples")


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
@pytest.mark.parametrize("resampled", [(), ("--dataset-resampled",)], ids=["", "resampled"])
def test_what_cannot_be_fetched_ends_the_run(loss, resampled, tmp_path, monkeypatch):
    monkeypatch.setattr(tally_module, "MOST_SECONDS_TO_WAIT", 0)
    data = f"pipe:echo fetched >> {tmp_path}/tries; exit 22 {{0..3}}.tar"
    flags = flags_of(loss, data, tmp_path, "--train-num-samples", 64, "--samples-per-shard", 16, *resampled)
    run = run_cli(flags, tmp_path / "out", timeout=60)
    refused(run, "could not be read", "pipe:echo")
    assert len(run.output[0]) < 20_000, run
    tries = len((tmp_path / "tries").read_text().split())
    assert 10 < tries <= 14 if resampled else tries == 8, "each shard twice when it fails for the first time"


def test_a_shard_that_fails_once_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tally_module, "MOST_SECONDS_TO_WAIT", 0)
    make_shards(tmp_path, shards=1, per_shard=8)
    url = f"pipe:mkdir {tmp_path}/tried 2> /dev/null || cat {tmp_path}/00000.tar"
    assert numbers(evaluation_loader(url).dataloader) == list(range(8))


@pytest.mark.parametrize("end", ["exit 22", "sleep 0.2; exit 22", "printf junk; exit 22"])
def test_the_command_says_why_nothing_came(end, tmp_path, monkeypatch, caplog):
    """It may close its output before it ends."""
    monkeypatch.setattr(tally_module, "MOST_SECONDS_TO_WAIT", 0)
    with pytest.raises(UserError, match="its command ended with exit code 22"):
        evaluation_loader(f"pipe:exec 2>&-; {end if 'junk' in end else f'exec >&-; {end}'}")


def test_a_shard_that_cannot_be_fetched_costs_one_wait(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(tar_files, "time", Namespace(sleep=waits.append))
    make_shards(tmp_path, shards=2, per_shard=16, kinds=PAIR)
    data = f"pipe:cat {tmp_path}/{{00000..00002}}.tar"
    args = {"dataset_resampled": True, "train_num_samples": 128, "buffer": 400}
    info = watched(stock_loader(data, **args), train_num_samples=128)
    assert len(numbers(info.dataloader)) == 128 and len(waits) == 1


# ---- evaluation


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_unusable_evaluation_data_end_the_run_before_it_trains(loss, tmp_path):
    train, val = make_csv(tmp_path, rows=16), mixed_shards(tmp_path / "val", unusable=range(64))
    run = run_cli(flags_of(loss, train, tmp_path, "--val-data", val), tmp_path / "out", ranks=2, timeout=60)
    refused(run, "--val-data has no usable sample: 64 of 64 samples", "(gif, txt found)")
    assert "Start epoch" not in run.output[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_evaluation_leaves_out_is_told(workers, tmp_path, caplog):
    data = mixed_shards(tmp_path, unusable=range(0, 64, 4), shards=2)
    loader = evaluation_loader(data, workers).dataloader
    for _ in range(2):
        caplog.clear()
        assert numbers(loader) == [n for n in range(32) if n % 4]
        assert caplog.messages[0].startswith("--val-data: 8 of 32 samples that were read were not used: 8 without jpg")


# ---- too much of an epoch


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_mostly_unusable_data_end_the_run_early(loss, tmp_path):
    data = mixed_shards(tmp_path / "data", unusable=range(0, 64, 2))
    run = run_cli(flags_of(loss, data, tmp_path), tmp_path / "out", ranks=2, timeout=60)
    refused(run, "epoch 0: ", "without jpg, png, jpeg or webp (gif, txt found)", "more than --max-unusable 0.05")
    assert "Train Epoch" not in run.output[0] and "Train Epoch" not in run.output[1]


@pytest.mark.parametrize(("loss", "ranks"), [("clip", 1), ("fastclip-v3", 2)])
def test_too_many_unusable_samples_end_the_run_when_the_epoch_is_saved(loss, ranks, tmp_path, monkeypatch):
    """At an epoch's end, the last one's too; with more allowed the run goes on from there, and tells."""
    monkeypatch.setattr(CheckedLoader, "_check_so_far", lambda self: None)  # by chance it may be many in the beginning
    data = mixed_shards(tmp_path / "data", unusable={5, 20, 37, 50})
    for epochs, trained in ((1, 1), (3, 2)):
        flags = flags_of(loss, data, tmp_path, "--epochs", epochs, "--resume", "latest", "--max-unusable", 0.02)
        run = run_cli(flags, tmp_path / "out", ranks=ranks, timeout=60)
        refused(run, f"epoch {trained - 1}, which is trained and saved: ", "were not used", "--resume latest")
        assert f"Train Epoch: {trained - 1} " in run.output[0] and f"Train Epoch: {trained} " not in run.output[0]
        assert (tmp_path / "run" / "checkpoints" / f"epoch_{trained}.pt").exists()
    flags = flags_of(loss, data, tmp_path, "--epochs", 3, "--resume", "latest", "--max-unusable", 0.1)
    run = run_cli(flags, tmp_path / "out", ranks=ranks)
    assert run.ok, run
    (line,) = (line for line in warned(run) if "were not used" in line)
    assert re.search(r"epoch 2: \d of \d\d samples that were read were not used: \d without jpg", line), run


def test_an_epoch_that_leaves_nothing_out_says_nothing(tmp_path):
    data = make_shards(tmp_path / "data", shards=4, per_shard=8, kinds=PAIR)
    for loss in ("clip", "fastclip-v3"):
        run = run_cli([*flags_of(loss, data, tmp_path / loss), "--max-unusable", 0], tmp_path / "out")
        assert run.ok and not [line for line in warned(run) if "samples" in line or "shard" in line], run


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_sizes_that_say_more_than_the_shards_hold(loss, tmp_path):
    data = make_shards(tmp_path / "data", shards=2, per_shard=16, kinds=PAIR)
    (tmp_path / "data" / "sizes.json").write_text(json.dumps({"00000.tar": 16, "00001.tar": 40}))
    run = run_cli(flags_of(loss, data, tmp_path, "--workers", 1), tmp_path / "out")
    assert run.ok, run
    at_shard, at_end = (line for line in warned(run) if "00001.tar" in line)
    assert at_shard.endswith("00001.tar: it holds 16 samples, and 40 are recorded for it")
    assert "epoch 0: 1 of the shards hold another number of samples" in at_end and at_end.endswith(
        "00001.tar (16 of 40)"
    )


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_what_cut_shards_lose_is_told_in_numbers_and_counts(loss, tmp_path):
    """Where their sizes are recorded; compressed ones are cut without a sign before they are read."""
    make_shards(tmp_path, shards=4, per_shard=16, kinds=PAIR)
    for number in range(4):
        content = gzip.compress((tmp_path / f"{number:05d}.tar").read_bytes())
        size = len(content) // 2 if number % 2 else len(content)
        (tmp_path / f"{number:05d}.tar.gz").write_bytes(content[:size])
    (tmp_path / "sizes.json").write_text(json.dumps({f"{number:05d}.tar.gz": 16 for number in range(4)}))
    flags = flags_of(loss, f"{tmp_path}/{{00000..00003}}.tar.gz", tmp_path, "--dataset-type", "webdataset")
    run = run_cli(flags, tmp_path / "out", ranks=2, timeout=60)
    refused(
        run, "2 of the shards could not be read to their end, with which ", "of 16 samples, ", "--max-unusable 0.05"
    )
    run = run_cli([*flags, "--name", "more", "--max-unusable", 0.6], tmp_path / "out", ranks=2, timeout=60)
    assert run.ok and [line for line in warned(run) if "epoch 0: 2 of the shards could not be read to their" in line]


def test_a_shard_that_is_drawn_twice_in_a_row(tmp_path, caplog):
    """The buffer of samples is filled with 25 draws of two shards."""
    data = make_shards(tmp_path, shards=2, per_shard=8, kinds=PAIR, sizes=True)
    info = watched(stock_loader(data, dataset_resampled=True, buffer=400))
    assert len(numbers(info.dataloader)) == 16 and not caplog.messages


def test_sizes_that_say_less_than_the_shards_hold(tmp_path):
    """Without ids: with them it is an error, since there would be none for the others."""
    data = make_shards(tmp_path / "data", shards=2, per_shard=16, kinds=PAIR)
    (tmp_path / "data" / "sizes.json").write_text(json.dumps({"00000.tar": 16, "00001.tar": 8}))
    run = run_cli(flags_of("clip", data, tmp_path), tmp_path / "out")
    assert run.ok and [line for line in warned(run) if line.endswith("00001.tar (16 of 8)")], run


def test_samples_per_shard_is_no_claim(tmp_path, caplog):
    make_shards(tmp_path, shards=2, per_shard=8, kinds=PAIR)
    data = f"pipe:cat {tmp_path}/{{00000..00001}}.tar"
    list(numbered_loader(data, manifest_of(data, samples_per_shard=20), train_num_samples=16).dataloader)
    assert not caplog.messages


# ---- broken shards


def broken_shards(folder, shards=6):
    """Shards of which 1 is cut, 3 no tar and 4 is missing."""
    data = make_shards(folder, shards=shards, per_shard=16, kinds=PAIR)
    cut = folder / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "00003.tar").write_bytes(b"<html>" * 1000)
    (folder / "00004.tar").unlink()
    return data


def test_all_broken_shards_are_named(tmp_path):
    data = broken_shards(tmp_path / "data")
    words = ["of 6 shards, 3 cannot be used", "00001.tar is cut off", "00003.tar is no tar", "00004.tar does not exist"]
    refused(run_cli(flags_of("fastclip-v3", data, tmp_path), tmp_path / "out", ranks=2), *words, "--skip-broken-shards")
    flags = ["--", *map(str, flags_of("clip", data, tmp_path))]
    run = run_forked(preflight.main, (flags,), tmp_path / "out")
    assert run.codes == [2] and all(word in run.output[0] for word in words), run
    run = run_forked(preflight.main, ([*flags, "--skip-broken-shards"],), tmp_path / "out")
    assert run.ok and "3 shards (3 broken ones are left out)" in run.output[0], run


def test_ten_broken_shards_are_named_and_the_others_counted(tmp_path):
    with pytest.raises(UserError, match="of 25 shards, 25 cannot be used: .*00009.tar does not exist; and 15 more: "):
        manifest_of(f"{tmp_path}/{{00000..00024}}.tar")


def test_shards_that_only_the_scan_finds_broken(tmp_path):
    paths = [damaged(tmp_path / f"{number}.tar") for number in range(2)]
    data = f"{'::'.join(paths)}::{write_tar(tmp_path / '2.tar', sample_files(0, '0'))}"
    with pytest.raises(UserError, match="of 3 shards, 2 cannot be used: .*0.tar cannot be read .*1.tar cannot be read"):
        manifest_of(data)
    assert manifest_of(data, skip_broken=True) == manifest_of(f"{tmp_path}/2.tar")


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_broken_shards_can_be_left_out(loss, tmp_path):
    """Of training and evaluation data; the run has the ids, the hash and the length of the good ones alone."""
    data = broken_shards(tmp_path / "data")
    flags = flags_of(loss, data, tmp_path, "--val-data", data, "--skip-broken-shards", "--save-every", "2steps")
    run = run_cli(flags, tmp_path / "out", ranks=2)
    assert run.ok, run
    assert run.output[0].count("Train Epoch") == 3 and "num_samples: 48" in run.output[0], run
    lines = [line for line in warned(run) if "--skip-broken-shards leaves out 3 shards" in line]
    assert [re.search("of (--.*?): (.*)", line).groups() for line in lines] == [
        (flag, ", ".join(f"{tmp_path}/data/0000{number}.tar" for number in (1, 3, 4)))
        for flag in ("--train-data", "--val-data")
    ], run
    index = json.loads((tmp_path / "run" / "checkpoints" / "epoch_0_step_2" / "index.json").read_text())
    good = manifest_of("::".join(f"{tmp_path}/data/0000{number}.tar" for number in (0, 2, 5)))
    assert index["data_hash"] == good.identity.hash


def test_upsampling_factors_stay_with_their_sources(tmp_path):
    first, second = (make_shards(tmp_path / name, shards=2, per_shard=8) for name in "ab")
    data = f"{first}::{tmp_path}/b/00001.tar::{second}"
    settings = {"dataset_resampled": True, "train_data_upsampling_factors": "4::2::1", "train_num_samples": 16}
    info = stock_loader(data, **settings)
    keep_shards(info.dataloader, {f"{tmp_path}/a/00001.tar", f"{tmp_path}/b/00000.tar"}, "--train-data")
    shards = info.dataloader.pipeline[0].dataset.pipeline[0]
    assert [(Path(url).parent.name, weight) for url, weight in zip(shards.urls, shards.weights, strict=True)] == [
        ("a", 4),
        ("b", 1),
    ]

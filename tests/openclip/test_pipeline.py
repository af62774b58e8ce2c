"""Each id always comes with the same image and caption, and apart from the ids the batches are OpenCLIP's own."""

import logging
import struct
import traceback
import zlib
from collections import Counter

import pytest
import torch
from cli import TINY, run_cli
from loaders import (
    SEED,
    numbered_loader,
    numbered_rows,
    openclip_args,
    preprocess,
    seeded_stock_loader,
    stock_loader,
    tokenizer,
)
from make_data import make_csv, make_shards, number_of_image, sample_files, write_tar
from open_clip_train import data as openclip_data
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms

from open_clip_train_fastclip.data.manifest import ShardManifest
from open_clip_train_fastclip.data.stream import MAX_CAPTION_BYTES
from open_clip_train_fastclip.errors import UserError, user_message
from open_clip_train_fastclip.openclip.pipeline import manifest_of, rebuild

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # OpenCLIP sets it without a GPU, too

EPOCHS = 3
GARBAGE = b"this is no image"


def batches_of(info, epochs=EPOCHS):
    """All batches of some epochs, each begun with the same state of torch's generator, which orders rows."""
    batches = []
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        info.set_epoch(epoch)
        batches += list(info.dataloader)
    return batches


def seen(batches):
    """The set of (id, number of the image, number of the caption) in batches."""
    return {
        (int(id_), number_of_image(image), int(text))
        for images, texts, ids, _ in batches
        for image, text, id_ in zip(images, texts, ids, strict=True)
    }


def refusal(info):
    """The one line of the UserError that ends the iteration of a loader."""
    message = None
    try:
        batches_of(info)
    except UserError as error:
        message = user_message(error)
        # it holds the workers: left to the garbage collector, torch waits five seconds for each
        traceback.clear_frames(error.__traceback__)
    assert message and "\n" not in message
    return message


@pytest.fixture
def warnings(caplog):
    """The warnings so far as one text, those of workers excluded."""
    caplog.set_level(logging.WARNING)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("resampled", [False, True], ids=["", "resampled"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ids_name_samples_and_the_batches_are_those_of_openclip(ranks, workers, resampled, tmp_path, as_rank):
    data = make_shards(tmp_path, per_shard=[6, 5, 7, 6, 8, 6, 5, 7])
    settings = {"workers": workers, "world_size": ranks, "dataset_resampled": resampled, "train_num_samples": 50}
    samples, order = set(), []
    for rank in range(ranks):
        as_rank(rank, ranks)
        stock, ours = batches_of(seeded_stock_loader(data, **settings)), batches_of(numbered_loader(data, **settings))
        assert len(stock) == len(ours) > 0
        for (images, texts), (same_images, same_texts, ids, _) in zip(stock, ours, strict=True):
            assert torch.equal(images, same_images) and torch.equal(texts, same_texts)
            assert ids.dtype == torch.int64 and ids.shape == (4,)
        samples |= seen(ours)
        order.append([ids.tolist() for _, _, ids, _ in ours])
    assert all(id_ == image == caption for id_, image, caption in samples)
    if not resampled:
        # with only whole batches of a worker's shards, a pass leaves some samples out; three epochs see most of them
        assert len(samples) > 45
    assert len({str(of_rank) for of_rank in order}) == ranks, "the ranks draw different samples"
    per_epoch = len(order[0]) // EPOCHS
    assert order[0][:per_epoch] != order[0][per_epoch : 2 * per_epoch], "the epochs draw different orders"


def test_every_sample_of_a_pass_has_an_id_of_its_own(tmp_path):
    data = make_shards(tmp_path, per_shard=[3, 0, 9])
    batches = batches_of(numbered_loader(data), epochs=1)
    assert sorted(torch.cat([ids for _, _, ids, _ in batches]).tolist()) == list(range(12))


def test_joined_folders_with_equal_names_and_keys(tmp_path):
    first = make_shards(tmp_path / "a", shards=2, per_shard=8)
    # the same file names, and keys that start at 0 again
    for shard in range(2):
        files = [f for n in range(8) for f in sample_files(16 + 8 * shard + n, f"{8 * shard + n:09d}")]
        write_tar(tmp_path / "b" / f"{shard:05d}.tar", files)
    data = f"{first}::{tmp_path}/b/{{00000..00001}}.tar"
    assert seen(batches_of(numbered_loader(data))) == {(n, n, n) for n in range(32)}


def test_a_shard_listed_twice_has_its_ids_once(tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=4)
    info = numbered_loader(f"{data}::{tmp_path}/00001.tar")
    assert info.dataloader.num_samples == 12
    batches = batches_of(info, epochs=1)
    assert Counter(torch.cat([ids for _, _, ids, _ in batches]).tolist()) == {n: 1 + (n >= 4) for n in range(8)}
    assert seen(batches) == {(n, n, n) for n in range(8)}


def test_the_same_key_at_the_end_of_a_shard_and_the_start_of_the_next(tmp_path):
    """OpenCLIP would take an image without a caption and a caption without an image for one sample."""
    files = [[f for n in range(start, start + 4) for f in sample_files(n, str(n))] for start in (0, 4)]
    write_tar(tmp_path / "00000.tar", [*files[0], *sample_files(98, "same", ["png"])])
    write_tar(tmp_path / "00001.tar", [*sample_files(99, "same", ["txt"]), *files[1]])
    batches = batches_of(numbered_loader(f"{tmp_path}/{{00000..00001}}.tar", batch_size=2), epochs=6)
    assert seen(batches) == {(n, n, n) for n in range(4)} | {(n + 2, n, n) for n in range(4, 8)}


@pytest.mark.parametrize("kinds", [("jpg", "txt"), ("jpeg", "txt", "json"), ("webp", "txt"), ("txt", "png")])
def test_kinds_of_files(kinds, tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=8, kinds=kinds)
    assert seen(batches_of(numbered_loader(data), epochs=1)) == {(n, n, n) for n in range(16)}


@pytest.mark.parametrize("key", ["{:08x}", "./{:04d}", "some/folder/{:d}", "same"])
def test_keys_do_not_matter(key, tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=8, key=key, kinds=("png", "txt"))
    assert seen(batches_of(numbered_loader(data), epochs=1)) == {(n, n, n) for n in range(16)}


def test_upsampled_sources(tmp_path):
    sources = [make_shards(tmp_path / name, shards=2, per_shard=8, first=16 * i) for i, name in enumerate("ab")]
    data = "::".join(sources)
    settings = {"dataset_resampled": True, "train_data_upsampling_factors": "4::1", "train_num_samples": 160}
    stock, ours = batches_of(seeded_stock_loader(data, **settings)), batches_of(numbered_loader(data, **settings))
    for (images, _), (same_images, _, _, _) in zip(stock, ours, strict=True):
        assert torch.equal(images, same_images)
    samples = seen(ours)
    assert all(id_ == image == caption for id_, image, caption in samples) and len(samples) > 16
    ids = torch.cat([ids for _, _, ids, _ in ours])
    assert (ids < 16).sum() > 2 * (ids >= 16).sum()


def break_sample(files, number, kind, content):
    return [(name, content if name == f"{number:09d}.{kind}" else old) for name, old in files]


def png_of_size(width, height):
    """A file of some hundred bytes that claims to be an image of any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(9000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


FAULTS = {
    "no image": ("png", GARBAGE),
    "empty image": ("png", b""),
    "decode bomb": ("png", png_of_size(60_000, 60_000)),
    "cut image": ("png", dict(sample_files(3, "3"))["3.png"][:45]),
    "no utf-8": ("txt", b"\xff\xfe not utf-8"),
    "untokenisable": ("txt", b"untokenisable"),
    "long caption": ("txt", b"a" * (MAX_CAPTION_BYTES + 1)),
}


@pytest.mark.parametrize(("kind", "content"), FAULTS.values(), ids=FAULTS)
def test_an_undecodable_sample_is_skipped_by_name_and_keeps_its_slot(kind, content, tmp_path, warnings):
    files = [f for n in range(9) for f in sample_files(n, f"{n:09d}")]
    path = write_tar(tmp_path / "00000.tar", break_sample(files, 3, kind, content))
    batches = batches_of(numbered_loader(str(path)), epochs=1)
    assert seen(batches) == {(n, n, n) for n in range(9) if n != 3}
    assert f"shard {path}, sample {3:09d}: skipped" in warnings()


def test_a_run_goes_on_without_the_samples_that_are_broken(tmp_path):
    """All faults in one shard, through the command line: a warning for each, of a line, and a finished epoch."""
    files = [f for n in range(24) for f in sample_files(n, f"{n:09d}")]
    faults = {n: fault for n, fault in enumerate(FAULTS.items()) if fault[0] != "untokenisable"}
    for number, (_, (kind, content)) in faults.items():
        files = break_sample(files, number, kind, content)
    path = write_tar(tmp_path / "00000.tar", files)
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", path, "--logs", tmp_path, "--name", "run"]
    run = run_cli([*flags, "--workers", 1, "--max-unusable", 0.5], tmp_path / "out")
    assert run.ok and "Traceback" not in run.output[0], run
    for number, (name, _) in faults.items():
        named = [line for line in run.output[0].splitlines() if f"shard {path}, sample {number:09d}: skipped" in line]
        assert named, f"{name}\n{run}"


def test_samples_that_openclip_filters_keep_their_slots(tmp_path):
    """Without a caption, without an image, and a file between two parts of a sample, which OpenCLIP takes for two."""
    files = [
        *sample_files(0, "0", ["png", "txt"]),
        *sample_files(1, "1", ["png"]),
        *sample_files(2, "2", ["txt"]),
        ("README", b"has no ending, belongs to no sample"),
        ("__index__", b"metadata"),
        ("__meta__/3.png", b"metadata"),
        *sample_files(3, "3", ["png", "txt"]),
        ("4.other", b"x"),
        *sample_files(5, "5", ["png", "txt"]),
    ]
    path = write_tar(tmp_path / "00000.tar", files)
    manifest = manifest_of(str(path))
    assert manifest.num_samples == 6
    assert seen(batches_of(numbered_loader(str(path), batch_size=1), epochs=2)) == {(n, n, n) for n in (0, 3, 5)}


@pytest.mark.parametrize("workers", [0, 2])
def test_more_samples_than_recorded(workers, tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=8, sizes=True)
    (tmp_path / "sizes.json").write_text('{"00000.tar": 8, "00001.tar": 5}')
    message = refusal(numbered_loader(data, workers=workers))
    assert all(words in message for words in ("00001.tar", "000000013", "5 samples", "sizes.json")), message


def test_more_samples_than_samples_per_shard(tmp_path):
    make_shards(tmp_path, shards=1, per_shard=8)
    url = f"pipe:cat {tmp_path}/00000.tar"
    assert seen(batches_of(numbered_loader(url, manifest_of(url, samples_per_shard=10)), epochs=1)) == {
        (n, n, n) for n in range(8)
    }
    assert "--samples-per-shard" in refusal(numbered_loader(url, manifest_of(url, samples_per_shard=7)))


def test_a_remote_shard_that_breaks_off_keeps_the_ids_right(tmp_path, warnings):
    make_shards(tmp_path, shards=2, per_shard=8, kinds=("png", "txt"))
    urls = [f"pipe:head -c 9000 {tmp_path}/00000.tar", f"pipe:cat {tmp_path}/00001.tar"]
    data = "::".join(urls)
    info = numbered_loader(data, manifest_of(data, samples_per_shard=8), batch_size=2)
    samples = seen(batches_of(info))
    assert samples >= {(n, n, n) for n in range(8, 16)} and all(len(set(sample)) == 1 for sample in samples)
    assert 0 < sum(id_ < 8 for id_, _, _ in samples) < 8
    assert f"shard {urls[0]}: reading failed" in warnings()


def test_a_file_that_cannot_be_read_ends_its_shard(tmp_path, monkeypatch):
    """Behind an unreadable file ordinals could be wrong: OpenCLIP goes on there, we do not."""
    files = [f for n in range(8) for f in sample_files(n, f"{n}", ["png", "txt"])]
    path = write_tar(tmp_path / "00000.tar", files)
    manifest = manifest_of(str(path))
    read = openclip_data.tarfile_to_samples_nothrow.__globals__["tar_file_expander"].__globals__["tarfile"].TarFile
    extractfile = read.extractfile

    def fails_for_sample_2(tar, member):
        if member.name.startswith("2."):
            raise OSError(5, "Input/output error")
        return extractfile(tar, member)

    monkeypatch.setattr(read, "extractfile", fails_for_sample_2)
    assert seen(batches_of(numbered_loader(str(path), manifest, batch_size=1))) == {(n, n, n) for n in range(2)}


def test_a_shard_that_vanishes_is_a_warning(tmp_path, warnings):
    data = make_shards(tmp_path, shards=2, per_shard=8)
    info = numbered_loader(data)
    (tmp_path / "00000.tar").unlink()
    assert seen(batches_of(info, epochs=1)) == {(n, n, n) for n in range(8, 16)}
    assert f"shard {tmp_path}/00000.tar: reading failed" in warnings()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_without_a_whole_batch_is_an_error_instead_of_an_endless_loop(workers, tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=3)
    message = refusal(numbered_loader(data, workers=workers, batch_size=8))
    assert f"finds {3 if workers else 6} usable samples" in message and "--batch-size" in message


def test_the_loader_and_the_manifest_must_agree(tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=8)
    manifest = manifest_of(f"{tmp_path}/00000.tar")
    with pytest.raises(UserError, match="00001.tar"):
        rebuild(stock_loader(data, train_num_samples=16).dataloader, manifest, 8, SEED, None)


def test_another_openclip_is_refused(tmp_path):
    data = make_shards(tmp_path, shards=1, per_shard=8)
    info = stock_loader(data, train_num_samples=8)
    del info.dataloader.pipeline[0].dataset.pipeline[-4]
    with pytest.raises(UserError, match=r"_decode.*install 'open_clip_torch"):
        rebuild(info.dataloader, manifest_of(data), 8, SEED, None)


@pytest.mark.parametrize("kinds", [("png", "txt", "json"), ("png", "txt")], ids=["json", "key of the tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_json_keys(workers, kinds, tmp_path):
    data = make_shards(tmp_path, shards=2, per_shard=8, first=100, key="a/{:06d}" if "json" not in kinds else "{:06d}",
                       kinds=kinds)  # fmt: skip
    info = numbered_loader(data, sample_id="json-key", num_samples=116, workers=workers)
    assert seen(batches_of(info, epochs=1)) == {(n, n, n) for n in range(100, 116)}


def test_json_keys_count_above_the_file_name(tmp_path):
    files = [(f"x{n}.{name.split('.')[1]}", content) for n in range(4) for name, content in sample_files(n, f"{n}")]
    path = write_tar(tmp_path / "00000.tar", files)
    assert seen(batches_of(numbered_loader(str(path), sample_id="json-key"), epochs=1)) == {(n, n, n) for n in range(4)}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("key", "cure"), [("{:06d}", "--data-size"), ("f{:05x}", "--sample-id position")])
def test_json_keys_that_do_not_fit(key, cure, workers, tmp_path):
    data = make_shards(tmp_path, shards=1, per_shard=8, key=key)
    message = refusal(numbered_loader(data, sample_id="json-key", num_samples=7, workers=workers))
    assert cure in message and "00000.tar" in message
    assert key.format(7) in message if cure == "--data-size" else "f0000" in message


def test_ids_do_not_depend_on_the_manifest_with_json_keys(tmp_path):
    data = make_shards(tmp_path, shards=1, per_shard=8)
    info = stock_loader(data, train_num_samples=8)
    rebuild(info.dataloader, None, 8, SEED, info.shared_epoch)
    assert seen(batches_of(info, epochs=1)) == {(n, n, n) for n in range(8)}


class SamplerOfRank1(DistributedSampler):
    """As on rank 1 of 2, without a process group."""

    def __init__(self, rows):
        super().__init__(rows, num_replicas=2, rank=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("distributed", [False, True])
def test_rows_of_a_table(distributed, workers, tmp_path, monkeypatch):
    path = make_csv(tmp_path, rows=18)
    args = openclip_args(path, workers=workers, distributed=distributed)
    if distributed:
        monkeypatch.setattr(openclip_data, "DistributedSampler", SamplerOfRank1)
    stock = openclip_data.get_csv_dataset(args, preprocess, is_train=True, tokenizer=tokenizer)
    ours = openclip_data.get_csv_dataset(args, preprocess, is_train=True, tokenizer=tokenizer)
    ours = numbered_rows(ours)
    assert isinstance(ours.dataloader, DataLoader)
    for name in ("num_samples", "num_batches"):
        assert getattr(ours.dataloader, name) == getattr(stock.dataloader, name)
    expected, batches = batches_of(stock), batches_of(ours)
    assert len(batches) == EPOCHS * ours.dataloader.num_batches
    for (images, texts), (same_images, same_texts, ids, _) in zip(expected, batches, strict=True):
        assert torch.equal(images, same_images) and torch.equal(texts, same_texts) and ids.dtype == torch.int64
    samples = seen(batches)
    assert all(len(set(sample)) == 1 for sample in samples)
    assert len(samples) == 18 or distributed


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_a_table_that_cannot_be_read(workers, tmp_path):
    path = make_csv(tmp_path, rows=8)
    (tmp_path / "5.png").write_bytes(GARBAGE)
    args = openclip_args(path, workers=workers)
    info = numbered_rows(openclip_data.get_csv_dataset(args, preprocess, True, tokenizer=tokenizer))
    message = refusal(info)
    assert message.startswith("row 6 of --train-data") and str(tmp_path / "5.png") in message


def test_a_caption_of_a_table_that_is_too_long(tmp_path):
    path = make_csv(tmp_path, rows=8)
    rows = openclip_data.get_csv_dataset(openclip_args(path), preprocess, True, tokenizer=tokenizer)
    rows.dataloader.dataset.captions[5] = "é" * (MAX_CAPTION_BYTES // 2 + 1)
    assert refusal(numbered_rows(rows)).startswith("row 6 of --train-data has a caption of more than 16,384 bytes")


def test_synthetic_rows():
    args = openclip_args(None, train_num_samples=8)
    resize = transforms.Compose([transforms.Resize((8, 8)), preprocess])
    info = openclip_data.get_synthetic_dataset(args, resize, True, tokenizer=lambda text: torch.zeros(1, 1))
    ids = [ids for _, _, ids, _ in numbered_rows(info).dataloader]
    assert sorted(torch.cat(ids).tolist()) == list(range(8))


def test_the_offsets_of_a_manifest():
    manifest = ShardManifest(("a/0.tar", "b/0.tar", "a/0.tar"), ("a/0.tar", "b/0.tar"), (3, 4))
    assert manifest.offsets == {"a/0.tar": 0, "b/0.tar": 3}
    assert manifest.num_samples == 7 and manifest.num_listed_samples == 10

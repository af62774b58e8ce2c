"""Of a shard nothing but image, caption and, for json keys, the json is opened, whatever else lies in it."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from cli import TINY, run_cli
from loaders import numbered_loader, openclip_args, preprocess, stock_loader, tokenizer
from make_data import sample_files, write_tar
from open_clip_train import data as openclip_data
from PIL import Image
from webdataset.autodecode import Decoder, ImageHandler

from open_clip_train_fastclip.data.decoding import decode_sample, needed_endings
from open_clip_train_fastclip.data.tar_files import shard_files
from open_clip_train_fastclip.openclip.usable import watch_stages

N = 12


class Harm:
    """Unpickling it makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def needless(mark):
    """Files that webdataset's decoder would open: what executes `mark`, what fails, and what takes time."""
    harm = pickle.dumps(Harm(mark))
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Harm(mark)], dtype=object))
    torch.save(Harm(mark), archive)
    broken = b"this is no such file"
    return {
        **{"pyd": harm, "pickle": harm, "pyd.gz": gzip.compress(harm)},
        **{"pth": archive.getvalue(), "npy": array.getvalue()},
        **dict.fromkeys(("npz", "cbor", "mp", "ten", "mp4", "flac", "id", "cls", "index", "tiff", "jpe", "gz"), broken),
    }  # fmt: skip


def make_shard(path, mark=None, broken_json=False):
    """A shard of N samples, each with all the needless files if there is a mark."""
    files = []
    for number in range(N):
        key = f"{number:09d}"
        mine = sample_files(number, key)
        if mark is not None:
            mine += [(f"{key}.{ending}", content) for ending, content in needless(mark).items()]
        files += [(name, b"{" if broken_json and name == "000000003.json" else content) for name, content in mine]
    return str(write_tar(path, files))


def evaluation_loader(shard):
    args = openclip_args(None, val_data=shard, val_num_samples=None)
    return openclip_data.get_wds_dataset(args, preprocess, is_train=False, tokenizer=tokenizer)


def contents(info):
    """Image and caption of all samples, by caption."""
    batches = [batch[:2] for batch in info.dataloader]
    samples = [(int(text), image) for images, texts in batches for image, text in zip(images, texts, strict=True)]
    return dict(sorted(samples, key=lambda sample: sample[0]))


LOADERS = {
    "training by position": lambda shard: numbered_loader(shard),
    "training by json key": lambda shard: numbered_loader(shard, sample_id="json-key"),
    "training of OpenCLIP's losses": lambda shard: stock_loader(shard, train_num_samples=N),
    "evaluation": evaluation_loader,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_needless_files_change_nothing_and_are_not_opened(kind, tmp_path):
    expected = contents(LOADERS[kind](make_shard(tmp_path / "plain.tar")))
    info = LOADERS[kind](make_shard(tmp_path / "full.tar", tmp_path / "mark"))
    if "by" not in kind:
        watch_stages(info.dataloader, {}, workers=0, is_train="training" in kind)
    found = contents(info)
    assert list(found) == list(expected) == list(range(N))
    assert all(torch.equal(found[number], expected[number]) for number in range(N))
    assert not (tmp_path / "mark").exists()


def test_the_mark_is_made_if_a_pickle_is_opened(tmp_path):
    Decoder([ImageHandler("pilrgb")])({"pyd": needless(tmp_path / "mark")["pyd"]})
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "flags",
    ["--loss clip", "--loss clip --dataset-resampled", "--loss siglip", "--loss fastclip-v3 --dataset-resampled"],
)
def test_every_loss_trains_and_evaluates_beside_needless_files(flags, tmp_path):
    shard = make_shard(tmp_path / "00000.tar", tmp_path / "mark")
    data = ["--train-data", shard, "--val-data", shard, "--logs", tmp_path]
    flags = [*TINY, "--batch-size", 4, *flags.split(), *data]
    run = run_cli(flags, tmp_path / "out")
    assert run.ok and "WARNING | shard" not in run.output[0] and not (tmp_path / "mark").exists(), run


@pytest.mark.parametrize(("sample_id", "skipped"), [("position", []), ("json-key", [3])])
def test_a_broken_json_matters_only_where_ids_are_in_it(sample_id, skipped, tmp_path, caplog):
    shard = make_shard(tmp_path / "00000.tar", broken_json=True)
    found = contents(numbered_loader(shard, sample_id=sample_id, batch_size=1, train_num_samples=N - len(skipped)))
    assert list(found) == [number for number in range(N) if number not in skipped]
    assert (f"shard {shard}, sample 000000003: skipped" in caplog.text) == bool(skipped)


def encoded(number, kind):
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 4), np.uint8))
    file = io.BytesIO()
    picture.convert("RGB" if kind == "JPEG" else "RGBA").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("first", "others"), [("jpg", "png jpeg webp"), ("png", "jpeg webp"), ("webp", "")])
def test_the_first_image_counts_and_is_decoded_as_webdataset_does(first, others):
    content = encoded(5, {"jpg": "JPEG"}.get(first, first.upper()))
    sample = {"__key__": "k", **dict.fromkeys(others.split(), b"broken"), first: content, "txt": "ä".encode()}
    decoded = decode_sample(sample, with_json=False)
    assert set(decoded) == {"__key__", first, "txt"} and decoded["txt"] == "ä"
    expected = ImageHandler("pilrgb")(f".{first}", content)
    assert decoded[first].mode == expected.mode == "RGB" and decoded[first].tobytes() == expected.tobytes()


class Unwatched:
    def shard_through(self, url):
        pass


@pytest.mark.parametrize("with_json", [False, True])
def test_needless_files_are_not_read(with_json, tmp_path, monkeypatch):
    """Neither into memory nor to the end; endings count in any case, and as a whole."""
    files = {
        "k.jpg": b"1",
        "k.TXT": b"2",
        "k.json": b"3",
        "k.mp4": b"long",
        "k.input.jpg": b"long",
        "noending": b"long",
    }
    write_tar(tmp_path / "0.tar", files.items())
    opened, extractfile = [], tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, member: opened.append(member.name) or extractfile(tar, member)
    )
    read = shard_files([{"url": str(tmp_path / "0.tar")}], needed_endings(with_json), Unwatched())
    needed = ["k.jpg", "k.TXT", *(["k.json"] if with_json else [])]
    assert {file["fname"]: file["data"] for file in read} == {
        name: content if name in needed else b"" for name, content in files.items()
    }
    assert opened == needed

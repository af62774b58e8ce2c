"""--imagenet-val and --imagenet-v2 name what the classifier can score, or the run does not begin."""

import os
from argparse import Namespace

import numpy as np
import open_clip
import pytest
import torch
from cli import TINY, run_cli, run_forked
from make_data import make_csv
from open_clip_train import data as openclip_data
from PIL import Image

from open_clip_train_fastclip import preflight
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.openclip import imagenet
from open_clip_train_fastclip.openclip.files import keep_content_of_images

CLASSES = 20  # in place of ImageNet's 1,000, but for the command line
WORDNET = [f"n{10_000_000 + n}" for n in range(CLASSES)]


@pytest.fixture
def few_classes(monkeypatch):
    monkeypatch.setattr(imagenet, "NUM_CLASSES", CLASSES)
    monkeypatch.setattr(imagenet, "V2_IMAGES", 10 * CLASSES)


def make_folder(folder, names, empty=()):
    """Class folders with a link to an image of the class's number, but for those that are empty."""
    folder.mkdir()
    for name in names:
        (folder / name).mkdir()
        if name not in empty:
            (folder / name / "a.JPEG").symlink_to("no file, and nobody opens it")
    return str(folder)


def refusal(**flags):
    with pytest.raises(UserError) as error:
        imagenet.check_folders(Namespace(**{"imagenet_val": None, "imagenet_v2": None} | flags))
    return str(error.value)


def test_imagenet_has_a_thousand_classes():
    assert (imagenet.NUM_CLASSES, imagenet.V2_IMAGES) == (1000, 10_000)


def test_all_classes_with_images_are_right(few_classes, tmp_path):
    folder = make_folder(tmp_path / "val", WORDNET)
    (tmp_path / "val" / "README").touch()
    imagenet.check_folders(Namespace(imagenet_val=folder, imagenet_v2=None))
    deeper = make_folder(tmp_path / "padded", [f"{n:04}" for n in range(CLASSES)])
    imagenet.check_folders(Namespace(imagenet_val=deeper, imagenet_v2=None))


@pytest.mark.parametrize(
    ("names", "empty", "message"),
    [
        (WORDNET[:10], (), "has 10 class folders, and the classifier has the 20 classes"),
        ([*WORDNET, "extra"], (), "has 21 class folders"),
        ([], (), "has no class folders"),
        (WORDNET, WORDNET[7:9], "the class folder n10000007 holds no image"),
        ([str(n) for n in range(CLASSES)], (), "0 to 19 without leading zeros"),
    ],
    ids=["ten", "one too many", "none", "empty", "numbers"],
)
def test_others_are_refused(names, empty, message, few_classes, tmp_path):
    folder = make_folder(tmp_path / "val", names, empty)
    assert f"--imagenet-val {folder}" in refusal(imagenet_val=folder) and message in refusal(imagenet_val=folder)


def test_the_second_version_is_the_package_s(few_classes, tmp_path, monkeypatch):
    where = {"imagenet_v2": str(tmp_path)}
    assert "has no ImageNetV2-matched-frequency" in refusal(**where)
    images = tmp_path / "ImageNetV2-matched-frequency"
    for n in range(CLASSES):
        (images / str(n)).mkdir(parents=True)
        for k in range(10):
            (images / str(n) / f"{k}.jpeg").touch()
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    assert "needs the package imagenetv2_pytorch" in refusal(**where)
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: name)
    imagenet.check_folders(Namespace(imagenet_val=None, **where))
    (images / "3" / "3.jpeg").unlink()
    assert "has 199 jpeg images in 20 class folders, and not 200" in refusal(**where)
    (images / "3" / "3.jpeg").touch()
    (images / "0").rename(images / "20")
    assert "0 to 19" in refusal(**where)


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_it_ends_every_rank_before_the_run_begins(loss, tmp_path):
    data, folder = make_csv(tmp_path, rows=16), make_folder(tmp_path / "val", WORDNET[:10])
    flags = [*TINY, "--loss", loss, "--train-data", data, "--imagenet-val", folder, "--logs", tmp_path / "logs"]
    run = run_cli(flags, tmp_path / "out", ranks=2)
    complaints = [line for output in run.output for line in output.splitlines() if "error" in line]
    assert run.codes == [2, 2] and len(complaints) == 1 and "1,000 classes" in complaints[0], run
    assert "Traceback" not in str(run) and not os.path.exists(tmp_path / "logs")
    found = run_forked(preflight.main, (["--", *map(str, flags)],), tmp_path / "out")
    assert found.codes == [2] and "1,000 classes" in found.output[0], found


def test_images_of_16_bits_in_folders_keep_their_content(tmp_path):
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) // 4
    for name, values in (("8", grey.astype(np.uint8)), ("16", grey * 257)):
        (tmp_path / name / "class").mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / name / "class" / "a.png")
    transform = open_clip.image_transform(32, is_train=False)
    images = {}
    for name in ("8", "16"):
        args = Namespace(imagenet_val=str(tmp_path / name), batch_size=1, workers=0)
        info = openclip_data.get_imagenet(args, (None, transform), "val")
        stock = info.dataloader.dataset[0][0]
        keep_content_of_images({"imagenet-val": info})
        images[name] = info.dataloader.dataset[0][0]
        assert torch.equal(images[name], stock) == (name == "8")
    assert torch.equal(images["8"], images["16"])
    (tmp_path / "8" / "class" / "a.png").write_bytes(b"no image")
    args = Namespace(imagenet_val=str(tmp_path / "8"), batch_size=1, workers=0)
    info = openclip_data.get_imagenet(args, (None, transform), "val")
    keep_content_of_images({"imagenet-val": info})
    with pytest.raises(UserError, match=r"image .*/a\.png cannot be read"):
        info.dataloader.dataset[0]

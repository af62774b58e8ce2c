"""The folders of ImageNet that are evaluated on, looked at before anything is built."""

import argparse
import importlib.util
import os
from collections.abc import Iterator

import open_clip
from torchvision.datasets.folder import is_image_file

from ..errors import UserError
from ..ranks import rank_share

NUM_CLASSES = len(open_clip.IMAGENET_CLASSNAMES)
V2_FOLDER = "ImageNetV2-matched-frequency"  # of the package imagenetv2_pytorch, which fetches what is not there
V2_PACKAGE, V2_IMAGES = "imagenetv2_pytorch", 10_000


def check_folders(args: argparse.Namespace) -> None:
    """Raise UserError for a folder that does not hold the classifier's classes in their order, or one without images.

    The ranks split the looking, so call it through ranks.agree.
    """
    if args.imagenet_val:
        _check_classes(f"--imagenet-val {args.imagenet_val}", args.imagenet_val)
    if args.imagenet_v2:
        _check_v2(f"--imagenet-v2 {args.imagenet_v2}", args.imagenet_v2)


def _check_classes(what: str, folder: str) -> None:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if len(names) != NUM_CLASSES:
        raise UserError(
            f"{what} has {len(names) or 'no'} class folders, and the classifier has the {NUM_CLASSES:,} classes of "
            "ImageNet: give the folder that holds n01440764 to n15075141"
        )
    if all(map(str.isdecimal, names)) and names != sorted(names, key=int):
        raise UserError(
            f"{what} has folders 0 to {NUM_CLASSES - 1} without leading zeros, which are taken in the order 0, 1, 10, "
            "100: name them by their WordNet ids, n01440764 to n15075141"
        )
    for name in rank_share(names):
        if not any(is_image_file(file) for _, file in _files(os.path.join(folder, name))):
            raise UserError(f"{what}: the class folder {name} holds no image: get it again, or leave the flag out")


def _check_v2(what: str, folder: str) -> None:
    images = os.path.join(folder, V2_FOLDER)
    if os.path.isdir(images):
        classes = [os.path.basename(place) for place, file in _files(images) if file.endswith(".jpeg")]
        if len(classes) != V2_IMAGES or set(classes) != set(map(str, range(NUM_CLASSES))):
            raise UserError(
                f"{what}: {V2_FOLDER} in it has {len(classes):,} jpeg images in {len(set(classes)):,} class folders, "
                f"and not {V2_IMAGES:,} in 0 to {NUM_CLASSES - 1}: get it again"
            )
    elif not os.path.isfile(f"{images}.tar.gz"):
        raise UserError(
            f"{what} has no {V2_FOLDER} with class folders 0 to {NUM_CLASSES - 1}, and each rank would fetch it: put "
            f"it there once, as {V2_PACKAGE}.ImageNetV2Dataset(location=...) does"
        )
    if importlib.util.find_spec(V2_PACKAGE) is None:
        raise UserError(f"--imagenet-v2 needs the package {V2_PACKAGE}: install it, or leave the flag out")


def _files(folder: str) -> Iterator[tuple[str, str]]:
    """The folder and the name of each file below a folder."""
    return ((place, file) for place, _, files in os.walk(folder, followlinks=True) for file in files)

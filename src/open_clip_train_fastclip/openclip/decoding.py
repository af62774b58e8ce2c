"""How the data that OpenCLIP has built open their files, where with_ids() does not see to it."""

from open_clip_train.data import DataInfo

from ..data.images import open_rgb
from .pipeline import decode_only_needed


def open_only_needed(data: dict[str, DataInfo], is_numbered: bool) -> None:
    """Make shards open image and caption alone, and folders of images keep what is in more than 8 bits, in place.

    is_numbered: with_ids() rebuilds the training data, and does so itself.
    """
    for kind, info in data.items():
        if hasattr(info.dataloader, "pipeline"):  # of shards
            if kind != "train" or not is_numbered:
                decode_only_needed(info.dataloader.pipeline[0].dataset.pipeline, shuffled=kind == "train")
        elif hasattr(info.dataloader.dataset, "loader"):  # torchvision's ImageFolder
            info.dataloader.dataset.loader = open_rgb

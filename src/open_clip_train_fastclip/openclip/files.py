"""How files are opened that OpenCLIP opens itself: those of its data, and its log and params.txt."""

import logging
from collections.abc import Callable
from typing import Any

from open_clip_train.data import DataInfo

from ..data.images import open_rgb
from .pipeline import decode_only_needed
from .tables import Columns, TableDataset


class FileHooks:
    """Those replacements of patches.PATCHES that need nothing of the run."""

    def setup_logging(self, stock: Callable[..., None], log_file: str | None, level: int) -> None:
        """OpenCLIP's loggers; a name that is no UTF-8, of a file or in a shard, costs no line of out.log."""
        stock(log_file, level)
        for handler in logging.root.handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream:
                handler.stream.reconfigure(errors="backslashreplace")

    def open_in_main(self, stock: Callable[..., Any], file: str, mode: str = "r") -> Any:
        """For params.txt, which keeps the bytes of names that are no UTF-8."""
        return stock(file, mode, errors="surrogateescape")

    def csv_dataset(
        self, stock: Any, input_filename: str, transforms: Any, img_key: str, caption_key: str, sep: str = "\t",
        tokenizer: Any = None,
    ) -> TableDataset:  # fmt: skip
        """The rows of a table, read as its lines say."""
        return TableDataset(Columns(input_filename, sep, img_key, caption_key), transforms, tokenizer)


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

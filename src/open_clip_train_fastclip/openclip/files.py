"""How files are opened that OpenCLIP opens itself, of its data, its log, params.txt, and where its batches lie."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from open_clip_train.data import DataInfo

from ..data.images import open_rgb
from .logs import EarlyLog, torch_log_levels_kept
from .tables import Columns, TableDataset


class FileHooks:
    """Those replacements of patches.PATCHES that need nothing of the run."""

    early_log: EarlyLog | None = None  # of train()

    def setup_logging(self, stock: Callable[..., None], log_file: str | None, level: int) -> None:
        """OpenCLIP's loggers, but torch's; a name that is no UTF-8, of a file or a sample, costs no line of out.log."""
        with torch_log_levels_kept():
            stock(log_file, level)
        for handler in logging.root.handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream:
                handler.stream.reconfigure(errors="backslashreplace")
        if self.early_log is not None:
            self.early_log.hand_on()

    def open_in_main(self, stock: Callable[..., Any], file: str, mode: str = "r") -> Any:
        """For params.txt, which keeps the bytes of names that are no UTF-8."""
        return stock(file, mode, errors="surrogateescape")

    def csv_dataset(
        self, stock: Any, input_filename: str, transforms: Any, img_key: str, caption_key: str, sep: str = "\t",
        tokenizer: Any = None,
    ) -> TableDataset:  # fmt: skip
        """The rows of a table, read as its lines say."""
        return TableDataset(Columns(input_filename, sep, img_key, caption_key), transforms, tokenizer)


def keep_content_of_images(data: dict[str, DataInfo]) -> None:
    """Make folders of images keep what is in more than 8 bits, in place."""
    for info in data.values():
        if hasattr(getattr(info.dataloader, "dataset", None), "loader"):  # torchvision's ImageFolder
            info.dataloader.dataset.loader = open_rgb


def pin_batches(data: dict[str, DataInfo], device: str) -> None:
    """Let all loaders copy their batches into pinned memory if the model is on a GPU, in place.

    OpenCLIP's loaders of tables do so. From other memory a batch takes longer to the GPU, and the host waits until the
    GPU has done what it was given before.
    """
    if torch.device(device).type == "cuda":
        for info in data.values():
            loader = getattr(info.dataloader, "pipeline", [info.dataloader])[0]  # webdataset's holds a DataLoader
            loader.pin_memory = True

"""OpenCLIP's loaders of make_data's tiny data sets, as they come and with our sample ids."""

from argparse import Namespace

import numpy as np
import torch
from make_data import caption_of
from open_clip_train import data as openclip_data

from open_clip_train_fastclip.data.rows import attach_row_ids
from open_clip_train_fastclip.data.tally import Tally
from open_clip_train_fastclip.openclip.pipeline import manifest_of, rebuild, seed_order

SEED = 7


def preprocess(image):
    return torch.from_numpy(np.array(image.convert("RGB")))


def tokenizer(texts):
    """[[n]] for the caption of number n."""
    texts = [texts] if isinstance(texts, str) else texts
    return torch.tensor([[int(text.removeprefix(caption_of(0)[:-1]))] for text in texts])


def openclip_args(train_data, **changed):
    defaults = {
        "train_data": train_data,
        "val_data": None,
        "train_num_samples": None,
        "train_data_upsampling_factors": None,
        "dataset_resampled": False,
        "batch_size": 4,
        "workers": 0,
        "world_size": 1,
        "distributed": False,
        "seed": 5,
        "csv_img_key": "filepath",
        "csv_caption_key": "title",
        "csv_separator": "\t",
    }
    return Namespace(**{**defaults, **changed})


def stock_loader(train_data, transform=preprocess, buffer=40, **changed):
    """OpenCLIP's DataInfo, its buffer of samples made as small as the data."""
    args = openclip_args(train_data, **changed)
    info = openclip_data.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
    stages = info.dataloader.pipeline[0].dataset.pipeline
    shuffle = next(stage for stage in stages if getattr(getattr(stage, "f", None), "__name__", "") == "_shuffle")
    shuffle.kw.update(bufsize=buffer, initial=buffer // 2)
    return info


def seeded_stock_loader(train_data, **changed):
    """The same with its one unseeded generator seeded as ours."""
    info = stock_loader(train_data, **changed)
    seed_order(info.dataloader.pipeline[0].dataset.pipeline, SEED, info.shared_epoch)
    return info


def numbered_loader(train_data, manifest=None, sample_id="position", num_samples=None, **changed):
    """OpenCLIP's DataInfo with our loader in it; info.position is the DataPosition."""
    manifest = manifest or manifest_of(train_data)
    changed.setdefault("train_num_samples", manifest.num_listed_samples)
    info = stock_loader(train_data, **changed)
    num_samples = num_samples or manifest.num_samples
    known = manifest if sample_id == "position" else None
    per_epoch = changed["train_num_samples"]
    tally = Tally(info.dataloader.pipeline[0].num_workers)
    info.position = rebuild(info.dataloader, known, num_samples, SEED, info.shared_epoch, tally, per_epoch)
    return info


def numbered_rows(info):
    """OpenCLIP's DataInfo of a table with our loader in it; info.position is the DataPosition."""
    info.shared_epoch = openclip_data.SharedEpoch(0)
    info.dataloader, info.position = attach_row_ids(info.dataloader, SEED, info.shared_epoch)
    return info

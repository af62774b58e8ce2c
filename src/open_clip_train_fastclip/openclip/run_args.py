"""What the settled flags of a run say of it."""

import argparse
from typing import Any

from ..loss.config import LOSSES

MODEL_SETTINGS = (  # flags that change what the model computes in evaluation
    *("model", "siglip", "force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
    *("lock_image", "lock_image_unlocked_groups", "lock_image_freeze_bn_stats"),
)


def is_fastclip(args: argparse.Namespace) -> bool:
    """Whether the run trains with a loss of ours."""
    return args.loss in LOSSES


def is_resumable(args: argparse.Namespace) -> bool:
    """Whether the run can be saved inside an epoch: it knows which samples it has had, and draws them seeded."""
    return has_training_data(args) and (is_fastclip(args) or args.save_every is not None)


def has_training_data(args: argparse.Namespace) -> bool:
    """Whether OpenCLIP's main() will build a training set, and so an optimizer and a loss."""
    return bool(args.train_data) or args.dataset_type == "synthetic"


def has_evaluation_data(args: argparse.Namespace) -> bool:
    """Whether rank 0 will evaluate."""
    return bool(args.val_data or args.imagenet_val or args.imagenet_v2)


def logs_are_written(args: argparse.Namespace) -> bool:
    """Whether the run writes logs and checkpoints (`--logs none` switches both off)."""
    return bool(args.logs) and args.logs.lower() != "none"


def global_batch_size(args: argparse.Namespace) -> int:
    """Pairs of one step over all ranks and accumulated micro-batches."""
    pairs: int = args.batch_size * args.world_size * args.accum_freq
    return pairs


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the run's checkpoint needs to build its model: plain values."""
    return {name: getattr(args, name) for name in MODEL_SETTINGS}


def is_webdataset(path: str, dataset_type: str) -> bool:
    """Whether OpenCLIP reads `path` as shards."""
    return dataset_type == "webdataset" or (dataset_type == "auto" and path.endswith(".tar"))


BUILDING_FLAGS = (  # they say how the model is built, and may ask for what it does not have
    "--pretrained", "--pretrained-image", "--force-image-size", "--force-context-length", "--force-patch-dropout",
    "--force-custom-text", "--torchscript",
)  # fmt: skip


def building_flags(args: argparse.Namespace) -> list[str]:
    """Those of BUILDING_FLAGS that are given."""
    return [flag for flag in BUILDING_FLAGS if getattr(args, flag[2:].replace("-", "_"))]

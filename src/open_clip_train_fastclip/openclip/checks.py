"""What is refused, once, of what the flags name: files, columns, sizes, models. flag_checks.py has the flags alone."""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch

from ..checkpoint.index import CHECKPOINT, INDEX
from ..errors import UserError, named_line
from . import imagenet, tables
from .run_args import building_flags, global_batch_size, has_evaluation_data, has_training_data, is_fastclip

T = TypeVar("T")


def check_before_building(args: argparse.Namespace) -> None:
    """Raise UserError for a taken name, missing files and folders, unreadable tables, or a batch that is too small."""
    _check_name(args)
    _check_logs(args)
    if not has_training_data(args) and not has_evaluation_data(args):
        raise UserError("there are no data: add --train-data, or --val-data or --imagenet-val to evaluate")
    if args.use_bn_sync and args.device.startswith("cpu"):
        raise UserError("--use-bn-sync works on GPUs only, and the device is the CPU: leave it out")
    _check_gpu(args)
    _check_pretrained(args)
    if args.resume and args.resume != "latest" and "://" not in args.resume:
        _check_resume(Path(args.resume))
    for flag, path in (("--imagenet-val", args.imagenet_val), ("--imagenet-v2", args.imagenet_v2)):
        if path and not os.path.isdir(path):
            raise UserError(f"{flag} {path}: there is no such folder")
    imagenet.check_folders(args)
    for flag, path in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if path:
            _check_data(flag, path, args)
    if args.loss != "siglip" and has_training_data(args) and global_batch_size(args) < 2:
        raise UserError(
            "a global batch of 1 pair has nothing to compare it with: give --batch-size 2 or more (or more ranks)"
        )


def _check_name(args: argparse.Namespace) -> None:
    if not args.name or args.resume == "latest" or args.rank != 0:
        return
    log = Path(args.logs or "", args.name, "out-0" if args.log_local else "out.log")
    if log.exists():
        raise UserError(
            f"{log} exists: give another --name, or --resume latest to go on with that run; nothing was changed"
        )


def _check_logs(args: argparse.Namespace) -> None:
    """Whether main() will be able to make its folder, which it does also with --logs none."""
    if args.rank != 0 and not args.log_local:
        return
    folder = Path(args.logs, args.name or "").absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise UserError(f"--logs {args.logs}: {folder} takes no folder ({error.strerror}): give another one") from None


def _check_gpu(args: argparse.Namespace) -> None:
    device, gpus = torch.device(args.device), torch.cuda.device_count()
    if not args.distributed and device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {args.device} on a machine with {gpus} GPUs, which count from cuda:0: name another")


def _check_pretrained(args: argparse.Namespace) -> None:
    model, weights = args.model.replace("/", "-"), args.pretrained
    if not weights or model.startswith(("hf-hub:", "local-dir:")):  # OpenCLIP takes their own weights
        return
    if not open_clip.pretrained.is_pretrained_cfg(model, weights) and not os.path.isfile(weights):
        tags = open_clip.list_pretrained_tags_by_model(model)
        known = f"whose tags are {', '.join(tags)}" if tags else "which has no tags"
        raise UserError(f"--pretrained {weights}: there is no such file, nor such a tag of {model}, {known}")


def _check_resume(path: Path) -> None:
    if not path.exists():
        raise UserError(f"--resume {path}: there is no such file")
    if path.suffix == ".safetensors":
        raise UserError(f"--resume {path} holds weights alone: start from them with --pretrained {path}")
    if path.suffix == ".fastclip":
        raise UserError(f"--resume {path} is the state beside a checkpoint: name {path.with_suffix('.pt')}")
    if path.is_dir() and not (path / INDEX).exists() and not (path / CHECKPOINT).exists():
        # of a run's checkpoints, of a run, or of --logs
        below = ("*.pt", "checkpoints/*.pt", "*/checkpoints/*.pt")
        found = [file for pattern in below for file in path.glob(pattern) if file.is_file()]
        if not found:
            raise UserError(f"--resume {path} is a folder without a checkpoint (.pt) in it: name the file of one")
        newest = max(found, key=os.path.getmtime)
        raise UserError(
            f"--resume {path} is a folder: name a checkpoint in it, such as {newest}, or go on with --name and "
            "--resume latest"
        )


def _check_data(flag: str, path: str, args: argparse.Namespace) -> None:
    kind = args.dataset_type
    if kind == "auto" and path.rsplit(".", 1)[-1] not in ("csv", "tsv", "tar"):
        raise UserError(
            f"{flag} {path}: the ending tells no kind of data: name .tar shards, a .csv or .tsv, or set --dataset-type"
        )
    if kind != "csv" and not (kind == "auto" and path.endswith(("csv", "tsv"))):
        return
    try:
        tables.read_table(tables.Columns.of(path, args))
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def check_steps(dataloader: Any, args: argparse.Namespace) -> None:
    """Raise UserError if an epoch is too short for a single step, which OpenCLIP would skip in silence."""
    if dataloader.num_batches < args.accum_freq:
        raise UserError(
            f"an epoch has {dataloader.num_batches} batches of {args.batch_size} pairs on each of {args.world_size} "
            f"ranks, and a step needs {args.accum_freq}: lower --batch-size or --accum-freq"
        )


def check_model(model: Any, args: argparse.Namespace) -> None:
    """Raise UserError if the model has no logit_scale, or a logit_bias, and the loss cannot work with that."""
    if not hasattr(model, "logit_scale"):
        raise UserError(f"--model {args.model} has no logit_scale, which --loss {args.loss} needs: use a CLIP model")
    if 0 in getattr(model.visual, "grid_size", ()):
        raise UserError(
            f"--force-image-size {args.force_image_size}: --model {args.model} has larger patches: give a larger one"
        )
    if not is_fastclip(args):
        return
    if getattr(model, "logit_bias", None) is not None:
        raise UserError(f"--model {args.model} has a logit_bias, made for --loss siglip: use a model without one")
    if hasattr(model, "text_decoder"):
        raise UserError(f"--model {args.model} is a CoCa model, whose captioning {args.loss} does not train: use CLIP")


def build_model(build: Callable[..., T], args: argparse.Namespace, *positional: Any, **keywords: Any) -> T:
    """build(...), whose failure is a UserError if a flag that says how to build is given."""
    try:
        return build(*positional, **keywords)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # weights are of any kind and origin
        flags = building_flags(args)
        if not flags:
            raise
        raise UserError(
            f"--model {args.model} cannot be built with {', '.join(flags)} ({named_line(error)}): correct them"
        ) from None


def check_locks(model: Any, args: argparse.Namespace) -> None:
    """Raise UserError if the towers cannot be locked as the flags say, which is tried, or nothing is left to train."""
    image = {"unlocked_groups": args.lock_image_unlocked_groups, "freeze_bn_stats": args.lock_image_freeze_bn_stats}
    text = {"unlocked_layers": args.lock_text_unlocked_layers, "freeze_layer_norm": args.lock_text_freeze_layer_norm}
    for flag, given, tower, options in (
        ("--lock-image", args.lock_image, "lock_image_tower", image),
        ("--lock-text", args.lock_text, "lock_text_tower", text),
    ):
        try:
            if given:
                getattr(model, tower)(**options)
        except Exception as error:  # each kind of tower has its own
            cure = f"leave {flag} out, or its other flags"
            if flag == "--lock-text" and not args.lock_text_freeze_layer_norm:
                cure = "add --lock-text-freeze-layer-norm"
            raise UserError(f"{flag} fails with --model {args.model} ({named_line(error)}): {cure}") from None
    left = {name for name, value in model.named_parameters() if value.requires_grad}
    if has_training_data(args) and left <= {"logit_scale", "logit_bias"}:
        raise UserError("--lock-image and --lock-text leave nothing to train: leave one of them out")

"""What is refused, once: contradictions between flags, and names, files, columns and sizes that do not fit."""

import argparse
import difflib
import os
from pathlib import Path
from typing import Any

import open_clip

from ..errors import UserError
from ..loss.config import CONSTANT, LOSSES, TAU_MAX, TAU_MIN, losses_with
from ..training.save_trigger import parse_interval
from . import imagenet, tables
from .run_args import (
    global_batch_size,
    has_evaluation_data,
    has_training_data,
    is_fastclip,
    is_webdataset,
    logs_are_written,
)

# -------------------------------------------------------------------- flags alone


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for the first contradiction in `args`, whose loss is settled; names the flags and the cure."""
    _check_model_name(args)
    _check_sizes(args)
    _check_data_flags(args)
    _check_saving(args)
    if args.loss in LOSSES:
        _check_fastclip(args)
    elif args.temperature is not None:
        _require(
            TAU_MIN <= args.temperature <= TAU_MAX,
            f"--temperature is {args.temperature}: it must be in [{TAU_MIN}, {TAU_MAX}]",
        )
    _require(
        args.grad_compression == "none" or not args.horovod,
        "--grad-compression compresses torch's all-reduce, which --horovod replaces: leave one of them out",
    )
    _require(
        args.loss == "clip" or not args.freeze_temperature,
        f"--freeze-temperature works only with --loss clip, and the loss is {args.loss}: leave it out "
        f"({' and '.join(losses_with(CONSTANT))} have a constant temperature)",
    )
    _require(
        args.resume or not args.fastclip_fresh_state,
        "--fastclip-fresh-state works only with --resume: add --resume FILE, or leave it out",
    )
    _require(
        args.resume != "latest" or not args.fastclip_fresh_state,
        "--fastclip-fresh-state with --resume latest would begin at epoch 0 at every restart: name the file",
    )


def _require(ok: Any, message: str) -> None:
    if not ok:
        raise UserError(message)


def _check_model_name(args: argparse.Namespace) -> None:
    if args.model.startswith(("hf-hub:", "local-dir:")):
        return
    names = {name.lower(): name for name in open_clip.list_models()}
    wanted = args.model.replace("/", "-")
    if wanted not in names.values():
        near = [names[name] for name in difflib.get_close_matches(wanted.lower(), names, n=3, cutoff=0.5)]
        cure = f"the nearest are {', '.join(near)}" if near else "open_clip.list_models() names all"
        raise UserError(f"--model {args.model} is unknown: {cure}")


def _check_sizes(args: argparse.Namespace) -> None:
    for flag, value in (
        ("--data-size", args.data_size),
        ("--samples-per-shard", args.samples_per_shard),
        ("--stop-epochs", args.stop_epochs),
        ("--batch-size", args.batch_size),
        ("--accum-freq", args.accum_freq),
    ):
        _require(value is None or value >= 1, f"{flag} is {value}: it must be 1 or more")
    _require(
        args.lr_scheduler != "const-cooldown" or args.epochs_cooldown is not None,
        "--lr-scheduler const-cooldown needs --epochs-cooldown: add it",
    )
    _require(args.dist_timeout > 0, f"--dist-timeout is {args.dist_timeout}: it must be above 0 seconds")
    if not args.lr_min:
        return
    cosine = args.lr_scheduler == "cosine" and not args.skip_scheduler
    _require(
        cosine,
        "--lr-min is the floor of the cosine, and there is none with --skip-scheduler or --lr-scheduler "
        f"{args.lr_scheduler}: leave one of them out",
    )
    _require(0 <= args.lr_min <= args.lr, f"--lr-min is {args.lr_min}: it must be between 0 and --lr {args.lr}")


def _check_data_flags(args: argparse.Namespace) -> None:
    factors = args.train_data_upsampling_factors
    if factors is not None and args.train_data:
        _require(
            args.dataset_resampled,
            "--train-data-upsampling-factors works only with --dataset-resampled: add it, or leave the factors out",
        )
        sources, given = len(args.train_data.split("::")), len(factors.split("::"))
        _require(
            sources == given,
            f"--train-data-upsampling-factors has {given} factors and --train-data {sources} sources: give one each",
        )
    _require(
        args.dataset_type != "synthetic" or args.train_num_samples,
        "--dataset-type synthetic needs --train-num-samples: add it",
    )
    if args.sample_id == "position" or args.loss not in LOSSES or not has_training_data(args):
        return
    _require(
        args.train_data and is_webdataset(args.train_data, args.dataset_type),
        "--sample-id json-key needs webdataset shards as --train-data, and the data are rows: leave it out",
    )
    _require(args.data_size, "--sample-id json-key needs --data-size, a number above the largest key: add it")


def _check_saving(args: argparse.Namespace) -> None:
    _require(args.keep >= 1, f"--keep is {args.keep}: it must be 1 or more")
    if args.loss in LOSSES or args.save_every:
        _require(
            not args.delete_previous_checkpoint or args.save_frequency <= 1,
            f"--delete-previous-checkpoint removes a checkpoint one epoch later, and with --save-frequency "
            f"{args.save_frequency} nothing newer is saved by then: use --save-frequency 1, or leave one of them out",
        )
    if args.save_every is None:
        _require(not args.save_async, "--save-async works only with --save-every: add it, or leave --save-async out")
        return
    parse_interval(args.save_every)
    _require(logs_are_written(args), "--save-every has no place to save to with --logs none: give a folder")
    _require(
        has_training_data(args), "--save-every works only in training: add --train-data, or leave --save-every out"
    )
    refused = {"--horovod": args.horovod, "--trace": args.trace, "--remote-sync": args.remote_sync}
    for flag, value in refused.items():
        _require(not value, f"{flag} does not go with --save-every: leave one of them out")


def _check_fastclip(args: argparse.Namespace) -> None:
    _require(
        has_training_data(args) or (has_evaluation_data(args) and (args.resume or args.pretrained)),
        f"--loss {args.loss} needs training data: add --train-data (to evaluate only, give --resume or "
        "--pretrained, and --val-data or --imagenet-val)",
    )
    remote = args.resume and ("://" in args.resume or (args.resume == "latest" and args.remote_sync))
    _require(
        not remote,
        f"--resume {args.resume}: the state of --loss {args.loss} is read from a folder, not from a remote store: "
        "copy epoch_N.pt and epoch_N.fastclip here and name the .pt",
    )
    refused = {
        "--distill-model": args.distill_model,
        "--distill-pretrained": args.distill_pretrained,
        "--horovod": args.horovod,
        "--trace": args.trace,
    }
    for flag, value in refused.items():
        _require(not value, f"{flag} does not go with --loss {args.loss}: leave it out, or use --loss clip")
    if args.local_loss or args.gather_with_grad:
        args.fastclip_notes.append(
            f"--local-loss and --gather-with-grad are without effect: with --loss {args.loss} every rank always "
            "computes only its own part"
        )


# -------------------------------------------------------------------- what the flags name


def check_before_building(args: argparse.Namespace) -> None:
    """Raise UserError for a taken name, missing files and folders, unreadable tables, or a batch that is too small."""
    _check_name(args)
    if args.use_bn_sync and args.device.startswith("cpu"):
        raise UserError("--use-bn-sync works on GPUs only, and the device is the CPU: leave it out")
    if args.resume and args.resume != "latest" and "://" not in args.resume and not os.path.exists(args.resume):
        raise UserError(f"--resume {args.resume}: there is no such file")
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
    if not is_fastclip(args):
        return
    if getattr(model, "logit_bias", None) is not None:
        raise UserError(f"--model {args.model} has a logit_bias, made for --loss siglip: use a model without one")
    if hasattr(model, "text_decoder"):
        raise UserError(f"--model {args.model} is a CoCa model, whose captioning {args.loss} does not train: use CLIP")

"""What is refused of flags by themselves, before what they name is looked at; number_flags.py has the numbers."""

import argparse
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import warnings
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from open_clip.transform import AugmentationCfg, image_transform

from ..errors import UserError, named_line, one_line
from ..loss.config import CONSTANT, LOSSES, TAU_MAX, TAU_MIN, losses_with
from ..training.save_trigger import parse_interval
from .number_flags import check_numbers
from .run_args import has_evaluation_data, has_training_data, is_webdataset, logs_are_written


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for the first contradiction in `args`, whose loss is settled; names the flags and the cure."""
    _check_model_name("--model", args.model)
    check_numbers(args)
    _check_names(args)
    _check_augmentation(args.aug_cfg)
    _check_distillation(args)
    _check_sizes(args)
    _check_data_flags(args)
    _check_saving(args)
    if args.loss in LOSSES:
        _check_fastclip(args)
    elif args.temperature is not None:
        _require(
            TAU_MIN <= args.temperature <= TAU_MAX,
            f"--fastclip-temperature or --temperature is {args.temperature}: it must be in [{TAU_MIN}, {TAU_MAX}]",
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
    _require(
        not args.trace or not has_training_data(args), "--trace works only in evaluation: leave it or --train-data out"
    )
    _check_packages(args)


def _require(ok: Any, message: str) -> None:
    if not ok:
        raise UserError(message)


def _check_model_name(flag: str, model: str) -> None:
    if model.startswith(("hf-hub:", "local-dir:")):
        return
    names = {name.lower(): name for name in open_clip.list_models()}
    wanted = model.replace("/", "-")
    if wanted not in names.values():
        near = [names[name] for name in difflib.get_close_matches(wanted.lower(), names, n=3, cutoff=0.5)]
        cure = f"the nearest are {', '.join(near)}" if near else "open_clip.list_models() names all"
        raise UserError(f"{flag} {model} is unknown: {cure}")


def _check_names(args: argparse.Namespace) -> None:
    """Words of which OpenCLIP knows a few, and looks at them late or not at all."""
    for flag, words, known in (
        ("--lr-scheduler", [args.lr_scheduler], ("cosine", "const", "const-cooldown")),
        ("--report-to", re.split(r"[,\s]+", args.report_to.strip()), ("", "wandb", "tensorboard", "all", "none")),
    ):
        for word in words:
            choices = [name for name in known if name]
            _require(word in known, f"{flag} {word} is unknown: choose {', '.join(choices[:-1])} or {choices[-1]}")
    for part in (args.dist_backend or "gloo").split(","):  # one a kind of device, as cpu:gloo,cuda:nccl
        name = part.rpartition(":")[2]
        _require(dist.is_backend_available(name), f"--dist-backend {name} does not work here: give gloo or nccl")
    _require(
        re.match("(env|tcp|file)://", args.dist_url or "env://"),
        f"--dist-url {args.dist_url} is unknown: write tcp://HOST:PORT, file:///PATH, or env:// as torchrun sets it",
    )
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda", "mps"):  # OpenCLIP falls back to the CPU where these are not there
            torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        raise UserError(f"--device {args.device} does not work here ({one_line(error)}): give cuda or cpu") from None


def _check_augmentation(aug_cfg: dict[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(AugmentationCfg)]
    for name in aug_cfg:
        _require(name in names, f"--aug-cfg {name} is unknown: it takes {', '.join(names)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OpenCLIP says it again when it trains
            image_transform(32, is_train=True, aug_cfg=dict(aug_cfg))
    except Exception as error:  # whatever torchvision and timm make of a wrong value
        values = " ".join(f"{name}={value}" for name, value in aug_cfg.items())
        raise UserError(
            f"--aug-cfg {values} fits no augmentation ({named_line(error)}): a range is written as 'scale=(0.4, 1.0)'"
        ) from None


def _check_packages(args: argparse.Namespace) -> None:
    reports = args.report_to if "all" not in args.report_to else "wandb tensorboard"
    for needed, flag, package, install in (
        ("tensorboard" in reports, "--report-to tensorboard", "tensorboard", "tensorboard"),
        ("wandb" in reports, "--report-to wandb", "wandb", "wandb"),
        (args.horovod, "--horovod", "horovod", "horovod"),
        (args.use_bnb_linear, "--use-bnb-linear", "bitsandbytes", "bitsandbytes triton"),
    ):
        _require(
            not needed or importlib.util.find_spec(package),
            f"{flag} needs the package {package}, which is not installed: pip install {install}, or leave it out",
        )
    _require(
        "wandb" not in reports or has_training_data(args),
        "--report-to wandb works only in training: leave it out",
    )


def _check_distillation(args: argparse.Namespace) -> None:
    teacher = "--distill-model and --distill-pretrained"
    _require(bool(args.distill_model) == bool(args.distill_pretrained), f"{teacher} go together: give both or none")
    if args.distill_model:
        _check_model_name("--distill-model", args.distill_model)
        _require(
            args.accum_freq == 1, f"{teacher} do not go with --accum-freq {args.accum_freq}: leave one of them out"
        )
        _require("coca" not in args.model.lower(), f"{teacher} do not go with CoCa: use another --model")


def _check_sizes(args: argparse.Namespace) -> None:
    _require(
        args.epochs >= 1 or not has_training_data(args),
        "--epochs 0 trains nothing: give 1 or more, or leave --train-data out to evaluate",
    )
    _require(
        args.lr_scheduler != "const-cooldown" or args.epochs_cooldown is not None,
        "--lr-scheduler const-cooldown needs --epochs-cooldown: add it",
    )
    if not args.lr_min:
        return
    cosine = args.lr_scheduler == "cosine" and not args.skip_scheduler
    _require(
        cosine,
        "--lr-min is the floor of the cosine, and there is none with --skip-scheduler or --lr-scheduler "
        f"{args.lr_scheduler}: leave one of them out",
    )
    _require(0 <= args.lr_min <= args.lr, f"--lr-min is {args.lr_min}: it must be between 0 and --lr {args.lr}")


def _check_one_path_each(flag: str, value: str) -> None:
    """Several paths in one string are joined by ::; a blank or a comma inside braces or a command is none of ours."""
    for source in value.split("::"):
        outside_braces = re.sub(r"\{[^{}]*\}", "", source)
        several = re.search(r"\.(tar|csv|tsv)(\.\w+)?\s*[,\s]\s*\S", outside_braces)
        if several and not source.startswith("pipe:") and not os.path.exists(source):
            cure = "join them with ::" if several[1] == "tar" else "give one table"
            raise UserError(f"{flag} {source}: these are several paths in one string: {cure}")


def _check_factors(text: str) -> None:
    factors = text.split("::")
    for factor in factors:
        try:
            good = 0 <= float(factor) < math.inf
        except ValueError:
            good = False
        _require(
            good, f"--train-data-upsampling-factors {text}: {factor!r} must be a number, 0 or more, as in 1::2::0.5"
        )
    _require(
        any(float(factor) for factor in factors),
        f"--train-data-upsampling-factors {text}: one of them must be above 0",
    )


def _check_data_flags(args: argparse.Namespace) -> None:
    for flag, value in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if value:
            _check_one_path_each(flag, value)
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
        _check_factors(factors)
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

"""What can be seen to be wrong before anything is built: names, files, columns, sizes."""

import os
from pathlib import Path

import pandas as pd

from ..errors import UserError
from ..loss.config import LOSSES


def is_fastclip(args) -> bool:
    """Whether the run trains with a loss of ours."""
    return args.loss in LOSSES


def is_resumable(args) -> bool:
    """Whether the run can be saved inside an epoch: it knows which samples it has had, and draws them seeded."""
    return has_training_data(args) and (is_fastclip(args) or args.save_every is not None)


def has_training_data(args) -> bool:
    """Whether OpenCLIP's main() will build a training set, and so an optimizer and a loss."""
    return bool(args.train_data) or args.dataset_type == "synthetic"


def has_evaluation_data(args) -> bool:
    """Whether rank 0 will evaluate."""
    return bool(args.val_data or args.imagenet_val or args.imagenet_v2)


def logs_are_written(args) -> bool:
    """Whether the run writes logs and checkpoints (`--logs none` switches both off)."""
    return bool(args.logs) and args.logs.lower() != "none"


def global_batch_size(args) -> int:
    """Pairs of one step over all ranks and accumulated micro-batches."""
    return args.batch_size * args.world_size * args.accum_freq


def is_webdataset(path: str, dataset_type: str) -> bool:
    """Whether OpenCLIP reads `path` as shards."""
    return dataset_type == "webdataset" or (dataset_type == "auto" and path.endswith(".tar"))


def check_before_building(args) -> None:
    """Raise UserError for a taken name, a missing checkpoint, unreadable tables, or a batch that is too small."""
    _check_name(args)
    if args.use_bn_sync and args.device.startswith("cpu"):
        raise UserError("--use-bn-sync works on GPUs only, and the device is the CPU: leave it out")
    if args.resume and args.resume != "latest" and "://" not in args.resume and not os.path.exists(args.resume):
        raise UserError(f"--resume {args.resume}: there is no such file")
    for flag, path in (("--imagenet-val", args.imagenet_val), ("--imagenet-v2", args.imagenet_v2)):
        if path and not os.path.isdir(path):
            raise UserError(f"{flag} {path}: there is no such folder")
    for flag, path in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if path:
            _check_data(flag, path, args)
    if args.loss != "siglip" and has_training_data(args) and global_batch_size(args) < 2:
        raise UserError(
            "a global batch of 1 pair has nothing to compare it with: give --batch-size 2 or more (or more ranks)"
        )


def _check_name(args) -> None:
    if not args.name or args.resume == "latest" or args.rank != 0:
        return
    log = Path(args.logs or "", args.name, "out-0" if args.log_local else "out.log")
    if log.exists():
        raise UserError(
            f"{log} exists: give another --name, or --resume latest to go on with that run; nothing was changed"
        )


def _check_data(flag: str, path: str, args) -> None:
    kind = args.dataset_type
    if kind == "auto" and path.rsplit(".", 1)[-1] not in ("csv", "tsv", "tar"):
        raise UserError(
            f"{flag} {path}: the ending tells no kind of data: name .tar shards, a .csv or .tsv, or set --dataset-type"
        )
    if kind != "csv" and not (kind == "auto" and path.endswith(("csv", "tsv"))):
        return
    try:
        table = pd.read_csv(path, sep=args.csv_separator, nrows=1)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: there is no such file") from None
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{flag} {path} is no table ({str(error).splitlines()[0]}): check the file") from None
    columns = list(table.columns)
    for option, column in (("--csv-img-key", args.csv_img_key), ("--csv-caption-key", args.csv_caption_key)):
        if column not in columns:
            raise UserError(
                f"{flag} {path} has no column {column!r} ({option}); it has {', '.join(map(repr, columns[:8]))}: "
                f"name the right one, or its separator with --csv-separator"
            )
    if table.empty:
        raise UserError(f"{flag} {path} has no rows: check the file")


def check_steps(dataloader, args) -> None:
    """Raise UserError if an epoch is too short for a single step, which OpenCLIP would skip in silence."""
    if dataloader.num_batches < args.accum_freq:
        raise UserError(
            f"an epoch has {dataloader.num_batches} batches of {args.batch_size} pairs on each of {args.world_size} "
            f"ranks, and a step needs {args.accum_freq}: lower --batch-size or --accum-freq"
        )


def check_model(model, args) -> None:
    """Raise UserError if the model has no logit_scale, or a logit_bias, and the loss cannot work with that."""
    if not hasattr(model, "logit_scale"):
        raise UserError(f"--model {args.model} has no logit_scale, which --loss {args.loss} needs: use a CLIP model")
    if not is_fastclip(args):
        return
    if getattr(model, "logit_bias", None) is not None:
        raise UserError(f"--model {args.model} has a logit_bias, made for --loss siglip: use a model without one")
    if hasattr(model, "text_decoder"):
        raise UserError(f"--model {args.model} is a CoCa model, whose captioning {args.loss} does not train: use CLIP")

"""What would stop a run, found by one process in seconds, as rank 0 of all."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import open_clip
import open_clip_train.main
import torch

from ..checkpoint.pt_files import load_mapped
from ..data.shard_list import check_shards, check_shards_for_workers, expand_shards
from ..errors import UserError, one_line
from ..loss.config import FastCLIPConfig
from ..loss.sample_table import columns_of
from . import checks, register_models, run_args
from .hooks import Run
from .patches import applied
from .resume import find_latest, load_checkpoint
from .temperature import check_temperature


def findings(flags: list[str], processes: int, processes_per_node: int) -> list[str]:
    """What was found of a training command's flags, in a few words each. Raises UserError for what is wrong."""
    register_models()
    with applied(Run()):
        args: argparse.Namespace = open_clip_train.main.parse_args(flags)
    args.rank, args.world_size, args.distributed = 0, processes, processes > 1
    args.checkpoint_path = os.path.join(args.logs, args.name or "", "checkpoints")
    return [f"{processes} processes", *_check(args, processes_per_node)]


def _check(args: argparse.Namespace, processes_per_node: int) -> list[str]:
    """What was found, in a few words each. Raises UserError for what is wrong."""
    if args.device.startswith("cuda") and torch.cuda.device_count() < processes_per_node:
        raise UserError(
            f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here, and {processes_per_node} processes "
            "need one each: see to the driver, to torch's build and to the GPUs that the job asks for"
        )
    checks.check_before_building(args)
    findings = _check_data(args)
    with torch.device("meta"):  # shapes without memory
        try:
            model = open_clip.create_model(
                args.model, device="meta", force_custom_text=args.force_custom_text,
                force_context_length=args.force_context_length, force_image_size=args.force_image_size,
                **({"init_logit_bias": -10} if args.siglip else {}),
            )  # fmt: skip
        except Exception as error:  # such as text towers that other packages build
            return [*findings, f"name and disk not checked: {args.model} cannot be sized ({one_line(error)})"]
    checks.check_model(model, args)
    checks.check_locks(model, args)
    done = _check_resume(args, model)
    if not run_args.has_training_data(args):
        return [*findings, "evaluation only"]
    return [*findings, f"epochs done: {done} of {args.epochs}", _check_space(args, model, done)]


def _check_data(args: argparse.Namespace) -> list[str]:
    if args.val_data and run_args.is_webdataset(args.val_data, args.dataset_type):
        check_shards(args.val_data, "--val-data", args.skip_broken_shards)
    if not args.train_data or not run_args.is_webdataset(args.train_data, args.dataset_type):
        return []
    shards = len(check_shards(args.train_data, skip_broken=args.skip_broken_shards))
    check_shards_for_workers(shards, args.workers, args.world_size, args.dataset_resampled)
    broken = len(expand_shards(args.train_data)) - shards
    return [f"{shards:,} shards" + (f" ({broken:,} broken ones are left out)" if broken else "")]


def _check_resume(args: argparse.Namespace, model: Any) -> int:
    """Epochs done by the run that --resume continues; 0 if it starts."""
    path = find_latest(args) if args.resume == "latest" else args.resume
    if not path or "://" in str(path):
        return 0
    resumed, contents = load_checkpoint(_mapped, str(path), args, model)
    if resumed is not None and resumed.state is not None:
        check_temperature(resumed.state[1], args)
    return int(contents.get("epoch", 0))


def _mapped(path: str, map_location: str) -> Any:
    return load_mapped(path)


def _check_space(args: argparse.Namespace, model: Any, done: int) -> str:
    """Room for the checkpoints to come: weights and two moments in 4 bytes each, and FastCLIP's table."""
    if not run_args.logs_are_written(args):
        return "no checkpoints with --logs none"
    frequency = args.save_frequency
    saves = sum(epoch == args.epochs or (frequency > 0 and epoch % frequency == 0)
                for epoch in range(done + 1, args.epochs + 1))  # fmt: skip
    if args.delete_previous_checkpoint:
        saves = min(saves, 2)  # the new one is complete before the last one goes
    saves += 2 * args.save_most_recent
    if run_args.is_resumable(args):
        saves += args.keep + 1  # the new one is complete before the oldest one goes
    table = 0
    if run_args.is_fastclip(args):
        rows = args.data_size or args.train_num_samples or 0
        table = rows * 4 * len(columns_of(FastCLIPConfig(args.loss, num_samples=1)))
    needed = saves * (12 * sum(parameter.numel() for parameter in model.parameters()) + table)
    folder = Path(args.logs).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{saves} checkpoints take about {needed / 1e9:,.1f} GB and {folder} has {free / 1e9:,.1f} GB left: make "
            "room, give another --logs, save less often with --save-frequency, or add --delete-previous-checkpoint"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: see to its permissions, or give another --logs")
    return f"checkpoints take about {needed / 1e9:,.1f} GB of {free / 1e9:,.1f}"

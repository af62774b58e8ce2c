"""What would stop a run, found in seconds by one process before a job starts its many.

    python -m open_clip_train_fastclip.preflight --processes 32 --processes-per-node 4 -- FLAGS OF THE TRAINING COMMAND

Checks the flags, the GPUs, the data, the shards for all workers, the run's name and the space on the disk. The last
line that it prints says what it found, or what is wrong; the exit code is 0 or 2.
"""

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

import open_clip
import open_clip_train.main
import torch

from .checkpoint.atomic import one_line
from .data.shard_list import check_shards, check_shards_for_workers
from .errors import UserError, user_message
from .loss.config import INDIVIDUAL_TAU
from .openclip import checks
from .openclip.checkpoints import load_checkpoint, newest_checkpoint
from .openclip.hooks import Run
from .openclip.patches import applied
from .openclip.saving import LATEST


def main(argv: list[str] | None = None) -> int:
    """Check a run before it starts; returns the exit code: 0, or 2 for what must be mended."""
    parser = argparse.ArgumentParser(description="Check a run before it starts.", usage="%(prog)s [options] -- FLAGS")
    parser.add_argument("--processes", type=int, default=1, help="of the whole run; default: 1")
    parser.add_argument("--processes-per-node", type=int, default=1, help="default: 1")
    ours, flags = _split(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(ours)
    logging.disable(logging.WARNING)  # open_clip warns that the model, of which only the size counts, has no weights
    open_clip.add_model_config(Path(__file__).parent / "model_configs")
    try:
        args = _parsed(flags, options.processes)
        findings = [f"{options.processes} processes", *_check(args, options.processes_per_node)]
    except UserError as error:
        print(f"preflight: error: {user_message(error)}", file=sys.stderr)
        return 2
    print(f"preflight: {', '.join(findings)}")
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    return argv[: argv.index("--")], argv[argv.index("--") + 1 :]


def _parsed(flags: list[str], processes: int):
    """The settled flags, as rank 0 of so many processes has them."""
    with applied(Run()):
        args = open_clip_train.main.parse_args(flags)
    args.rank, args.world_size, args.distributed = 0, processes, processes > 1
    args.checkpoint_path = os.path.join(args.logs, args.name or "", "checkpoints")
    return args


def _check(args, processes_per_node: int) -> list[str]:
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
    done = _check_resume(args, model)
    if not checks.has_training_data(args):
        return [*findings, "evaluation only"]
    return [*findings, f"epochs done: {done} of {args.epochs}", _check_space(args, model, done)]


def _check_data(args) -> list[str]:
    if args.val_data and checks.is_webdataset(args.val_data, args.dataset_type):
        check_shards(args.val_data, "--val-data")
    if not args.train_data or not checks.is_webdataset(args.train_data, args.dataset_type):
        return []
    shards = len(check_shards(args.train_data))
    check_shards_for_workers(shards, args.workers, args.world_size, args.dataset_resampled)
    return [f"{shards:,} shards"]


def _check_resume(args, model) -> int:
    """Epochs done by the run that --resume continues; 0 if it starts."""
    path = args.resume
    if path == "latest":
        folder = Path(args.checkpoint_path)
        names = sorted(folder.glob("*.pt"), key=lambda file: open_clip_train.main.natural_key(str(file)))
        names = [name for name in names if (name.name == LATEST) == args.save_most_recent]
        path = newest_checkpoint(folder) or (str(names[-1]) if names else None)
    if not path or "://" in path:
        return 0
    _, contents = load_checkpoint(_mapped, path, args, model)
    return contents.get("epoch", 0)


def _mapped(path, map_location):
    return torch.load(path, map_location=map_location, mmap=True, weights_only=True)


def _check_space(args, model, done: int) -> str:
    """Room for the checkpoints to come: weights and two moments in 4 bytes each, and FastCLIP's table."""
    if not checks.logs_are_written(args):
        return "no checkpoints with --logs none"
    frequency = args.save_frequency
    saves = sum(epoch == args.epochs or (frequency > 0 and epoch % frequency == 0)
                for epoch in range(done + 1, args.epochs + 1))  # fmt: skip
    if args.delete_previous_checkpoint:
        saves = min(saves, 2)  # the new one is complete before the last one goes
    saves += 2 * args.save_most_recent
    if checks.is_resumable(args):
        saves += args.keep + 1  # the new one is complete before the oldest one goes
    rows = (args.data_size or args.train_num_samples or 0) if checks.is_fastclip(args) else 0
    table = rows * (32 if args.loss in INDIVIDUAL_TAU else 8)
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


if __name__ == "__main__":
    sys.exit(main())

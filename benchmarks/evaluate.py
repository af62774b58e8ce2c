"""Zero-shot evaluation of a checkpoint on the suites that are published for FastCLIP, through clip_benchmark.

    python -m benchmarks.evaluate logs/RUN/checkpoints/epoch_37.pt --suite imagenet-variants --data /data/eval

The data sets are folders wds_NAME in --data (docs/data.md says how to get them); nothing is downloaded. A suite's mean
is formed only over all of its tasks: one that is missing or fails is named, the others are shown and kept, and the
exit code is 1. The last line is JSON, and each row is appended to benchmarks/results/evaluate.jsonl.
"""

import argparse
import ast
import sys
from pathlib import Path

import open_clip
import torch
from open_clip.factory import load_state_dict

from open_clip_train_fastclip.errors import UserError, one_line
from open_clip_train_fastclip.openclip import register_models
from open_clip_train_fastclip.openclip.run_args import MODEL_SETTINGS

from .experiments.run_log import read_settings
from .harness.command import positive
from .harness.records import RESULTS, finish
from .zero_shot.tasks import SUITES, Task

TRANSFORMS = ("image_mean", "image_std", "image_interpolation", "image_resize_mode")
FORCED = ("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length")


def load_model(args):
    """Name and scores.Model of the command line. Raises UserError if the checkpoint cannot be loaded into it."""
    from .zero_shot.scores import Model

    if not args.checkpoint.is_file():
        raise UserError(f"{args.checkpoint}: there is no such file")
    register_models()
    settings = model_settings(args.checkpoint)
    name = args.model or settings.get("model")
    if not name:
        raise UserError(f"no params.txt beside {args.checkpoint} says which model this is: add --model")
    if ":" not in name and name not in open_clip.list_models():
        raise UserError(f"--model {name} is unknown: open_clip.list_models() names all")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, transform = trained_model(name, args.checkpoint, settings, device)
    except Exception as error:  # torch, open_clip and pickle have many for a file that does not fit
        raise UserError(f"{args.checkpoint} is no checkpoint of {name} ({one_line(error)}): check --model") from error
    tokenizer = open_clip.get_tokenizer(name, context_length=settings.get("force_context_length"))
    return name, Model(model.eval(), transform, tokenizer, device, args.batch_size, args.workers)


def model_settings(checkpoint: Path) -> dict:
    """The settings of the run that change the model: as the checkpoint itself says or, if it does not, params.txt.

    params.txt is looked for beside the checkpoint and in the two folders above.
    """
    found = (read_settings(folder) for folder in checkpoint.absolute().parents[:3])
    settings = {name: _plain(text) for name, text in next(filter(None, found), {}).items()}
    try:
        note = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["fastclip"]["model"]
    except Exception:  # a file of another kind, which open_clip may know, or a checkpoint without a note
        note = {}
    return {name: value for name, value in {**settings, **note}.items() if name in MODEL_SETTINGS}


def trained_model(name: str, checkpoint: Path, settings: dict, device: str):
    """The model built as the run built it, with its weights, and the transform of its images.

    Raises ValueError for weights of another model or of another size, which open_clip would resize.
    """
    changed = {key: settings[key] for key in (*TRANSFORMS, *FORCED) if key in settings}
    weights = load_state_dict(str(checkpoint))
    if "logit_bias" in weights:
        changed["init_logit_bias"] = 0.0  # so that there is one
    if any(key.startswith("text.") for key in weights):
        changed["force_custom_text"] = True
    # the weights of a model's own, as hf-hub: names have them, are not those of the run
    model, _, transform = open_clip.create_model_and_transforms(
        name, load_weights=False, pretrained_text=False, device=device, **changed
    )
    if settings.get("lock_image") and settings.get("lock_image_freeze_bn_stats"):
        model.lock_image_tower(settings["lock_image_unlocked_groups"], freeze_bn_stats=True)
    own = model.state_dict()
    for key in own.keys() & weights.keys():
        if own[key].numel() != weights[key].numel():
            raise ValueError(f"{key} has the shape {list(weights[key].shape)}, the model's has {list(own[key].shape)}")
    keys = open_clip.load_checkpoint(model, str(checkpoint), strict=False)
    # --torchscript stores buffers that other models make
    foreign = set(keys.unexpected_keys) - {key for key, _ in model.named_buffers()}
    if keys.missing_keys or foreign:
        raise ValueError(f"{sorted(foreign)[:3]} are not in the model, {keys.missing_keys[:3]} not in the checkpoint")
    return model, transform


def _plain(text: str):
    """The value that params.txt shows as its str()."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def task_row(task: Task, data: Path, model) -> dict:
    """What one task gives: its value, or why there is none."""
    from .zero_shot.scores import evaluate

    row = {"task": task.key, "metric": task.metric, "value": None, "samples": None, "error": None}
    folder = task.find(data)
    if folder is None:
        return row | {"error": f"missing: there is no {data}/wds_{task.name} and no {data}/wds_{task.name}_test"}
    try:
        row["value"], row["samples"] = evaluate(task, folder, model)
    except Exception as error:  # the other tasks may take hours, and need not be lost
        row["error"] = f"{folder.name}: {one_line(error)}"
    else:
        if row["samples"] != task.samples:
            print(f"warning: {folder} has {row['samples']} samples, the published test set {task.samples}", flush=True)
    return row


def show(rows: list[dict], mean: float | None) -> None:
    """The tasks, in %, and the mean as a table."""
    print(f"\n{'task':50} {'metric':22} {'samples':>8} {'%':>6}")
    for row in rows:
        value = row["error"] or f"{row['samples']:8} {100 * row['value']:6.2f}"
        print(f"{row['task']:50} {row['metric']:22} {value}")
    print(f"{'mean':82} " + ("not formed" if mean is None else f"{100 * mean:6.2f}"), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 (a data set is missing or failed) or 2 (wrong input)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description="Zero-shot evaluation.")
    parser.add_argument("checkpoint", type=Path, help="epoch_N.pt")
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets' folders wds_NAME")
    parser.add_argument("--model", help="name of the model (default: what the checkpoint or its params.txt says)")
    parser.add_argument("--batch-size", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of evaluate.jsonl")
    args = parser.parse_args(argv)
    tasks = SUITES[args.suite]
    try:
        if not any(task.find(args.data) for task in tasks):
            raise UserError(f"--data {args.data} holds no data set of {args.suite}: docs/data.md says how to get them")
        name, model = load_model(args)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install -e '.[evaluate]'", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [task_row(task, args.data, model) for task in tasks]
    lost = [row for row in rows if row["error"]]
    mean = None if lost else sum(row["value"] for row in rows) / len(rows)
    show(rows, mean)
    common = {"suite": args.suite, "checkpoint": str(args.checkpoint), "model": name}
    rows = [{"kind": "task"} | common | row for row in rows]
    rows.append({"kind": "mean"} | common | {"value": mean, "tasks": len(tasks), "lost": [row["task"] for row in lost]})
    finish("evaluate", argv, rows, args.results)
    if lost:
        names = ", ".join(row["task"] for row in lost)
        print(f"error: no mean of {args.suite}: {len(lost)} of {len(tasks)} tasks lack: {names}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

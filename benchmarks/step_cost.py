"""Whole training steps of OpenCLIP and of each FastCLIP loss, and what a large per-sample table costs.

    python -m benchmarks.step_cost [ViT-Glyph-32:2048 ...] [--ranks 1 2] [--table-samples 414080000]
    python -m benchmarks.step_cost ViT-B-32:256 RN50:128 --device cuda --precision amp_bf16 --ranks 1

Every loss is set up by the ordinary command line up to its first epoch; then blocks of a few steps of all losses are
run in turn in one process a rank, each by OpenCLIP's train_one_epoch with the patches that the loss has. The data are
OpenCLIP's synthetic ones with images and captions that differ and are ready, so that no decoding hides the steps. On a
CPU a data worker makes the batches, as in any real run; on a GPU they are there already, or steps would wait for that
worker. Several ranks talk over gloo, on GPUs over NCCL with one each. The last line is JSON, and each row is appended
to benchmarks/results/step_cost.jsonl.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist

from open_clip_train_fastclip.loss.config import LOSSES
from open_clip_train_fastclip.openclip import register_models

from .harness.command import positive
from .harness.processes import in_processes
from .harness.records import RESULTS, finish, quartiles, ratio_quartiles
from .harness.table_cost import table_rows
from .harness.training_steps import alternate_epochs, set_up

CASES = ("ViT-Glyph-32:64", "ViT-Glyph-32:512", "ViT-S-32:32")
CLIP_FLAGS = {1: "--loss clip", 2: "--loss clip --local-loss --gather-with-grad"}
FLAGS = (
    "--dataset-type synthetic --workers 1 --lr 1e-4 --warmup 10 --seed 0 --save-frequency 0 --log-every-n-steps 1000000"
)


def block_seconds(case: str, losses: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """On every rank: seconds of each loss's blocks of --steps steps, one a round, after a first one to warm up."""
    register_models()
    model, batch = case.rsplit(":", 1)
    ranks = int(os.environ["WORLD_SIZE"])
    samples = args.steps * int(batch) * ranks
    common = (
        f"{FLAGS} --device {args.device} --precision {args.precision} --model {model} --batch-size {batch} "
        f"--train-num-samples {samples} --epochs {args.rounds + 2}"
    ).split()
    with tempfile.TemporaryDirectory(prefix="step-cost-") as folder:
        trainers = {}
        for name in losses:
            flags = CLIP_FLAGS[min(ranks, 2)] if name == "clip" else f"--loss {name}"
            trainers[name] = set_up([*flags.split(), *common, "--logs", folder, "--name", name])
            if args.device == "cuda":  # where one data worker would be what a step waits for
                trainers[name].keep_batches(args.device)
        return alternate_epochs(trainers, args.rounds, args.device, dist.barrier if ranks > 1 else lambda: None)


def step_rows(case: str, losses: list[str], ranks: int, args) -> list[dict]:
    """A row a loss: samples/s, and the quartiles of its ratio to OpenCLIP's in the same round."""
    batch = int(case.rsplit(":", 1)[1])
    times = in_processes(ranks, block_seconds, case, ["clip", *losses], args, device=args.device)[0]
    rows = []
    for name, seconds in times.items():
        q1, ratio, q3 = ratio_quartiles(times["clip"], seconds)
        rows.append(
            {
                "kind": "step",
                "case": case,
                "ranks": ranks,
                "loss": name,
                "device": args.device,
                "precision": args.precision,
                "steps": args.steps,
                "rounds": args.rounds,
                "samples_per_second": round(args.steps * batch * ranks / quartiles(seconds)[1], 2),
                "samples_ratio_to_clip": round(ratio, 4),
                "ratio_quartiles": [round(q1, 4), round(q3, 4)],
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """The rows of one case and number of ranks as a table."""
    first = rows[0]
    print(f"\n{first['case']}, {first['ranks']} rank(s), {first['rounds']} rounds of {first['steps']} steps a loss")
    print(f"{'loss':13} {'samples/s':>10} {'ratio to OpenCLIP':>18}  quartiles")
    for row in rows:
        q1, q3 = row["ratio_quartiles"]
        ratio = f"{row['samples_ratio_to_clip']:18.3f}  {q1:.3f} to {q3:.3f}"
        print(f"{row['loss']:13} {row['samples_per_second']:10.1f} {ratio}", flush=True)


def case_of(text: str) -> str:
    """The type of MODEL:BATCH."""
    register_models()
    model, _, batch = text.rpartition(":")
    if model not in open_clip.list_models():
        raise argparse.ArgumentTypeError(f"{text} is no MODEL:BATCH with a model of open_clip.list_models()")
    positive(batch)
    return text


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description="Cost of whole training steps.")
    parser.add_argument(
        "cases", nargs="*", type=case_of, default=CASES, metavar="MODEL:BATCH",
        help=f"pairs a rank (default: {' '.join(CASES)})",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--precision", default="fp32", help="as OpenCLIP's (default: %(default)s)")
    parser.add_argument("--ranks", nargs="+", type=positive, default=[1, 2], help="default: %(default)s")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help="default: all of FastCLIP's"
    )
    parser.add_argument("--rounds", type=positive, default=10, help="blocks of each loss (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="of a block, an epoch (default: %(default)s)")
    parser.add_argument(
        "--table-samples", type=int, default=414_080_000, metavar="N",
        help="rows of the table whose cost is measured on 2 ranks; 0: leave it out (default: LAION400M's %(default)s)",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step_cost.jsonl")
    args = parser.parse_args(argv)
    if args.device == "cuda" and max(args.ranks) > torch.cuda.device_count():
        parser.error(f"--ranks {max(args.ranks)} takes as many GPUs, and torch finds {torch.cuda.device_count()} here")
    rows = []
    for case in args.cases:
        for ranks in args.ranks:
            rows += step_rows(case, args.losses, ranks, args)
            show(rows[-1 - len(args.losses) :])
    if args.table_samples:
        rows += table_rows(args.table_samples)
    finish("step_cost", argv, rows, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory of one rank's loss: OpenCLIP's ClipLoss, each FastCLIP loss, and four bare matrix products.

    python -m benchmarks.loss_cost [160x5120x512 ...] [--device cuda] [--dtype amp_bf16] [--threads 1] [--seconds 60]

All of a case are run in turn in one process, forward plus backward; one_rank.py says what is in a step. TF32 is allowed
as OpenCLIP's main() allows it. The last line is JSON, and each row is appended to benchmarks/results/loss_cost.jsonl.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from open_clip_train_fastclip.loss.config import LOSSES

from .harness.memory import gpu_bytes, peak_extra_bytes
from .harness.one_rank import DTYPES, FLOOR, OPEN_CLIP, Case, Features, make_step
from .harness.processes import in_processes
from .harness.records import RESULTS, finish, quartiles, ratio_quartiles
from .harness.timing import allow_tf32, synchronize

CASES = ("128x1024x512", "160x5120x512", "256x8192x512", "1024x32768x512", "256x256x512", "1024x1024x512")
LEAST_ROUNDS, MOST_ROUNDS = 5, 300
WARM_UP = 3  # calls until a GPU has compiled and recorded a step, which keeps memory


def extra_bytes(name: str, case: Case, device: str, kind: str) -> int:
    """Peak memory of one step beyond the features of this rank and of all others, and the table."""
    allow_tf32()
    small = Case(2, 4, 8)
    make_step(name, small, Features(small, device, kind))()
    features = Features(case, device, kind)
    step, before = make_step(name, case, features), gpu_bytes(device)
    for _ in range(WARM_UP if device == "cuda" else 0):
        step()
    extra = peak_extra_bytes(step, device, before)
    if name == OPEN_CLIP and case.ranks > 1:
        # The pieces that were concatenated stay here; a real gather's are gone when memory is at its peak.
        extra -= features.image_Bd.nbytes + features.text_Bd.nbytes
    return extra


def alternate(steps: dict[str, Callable[[], None]], seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of each step, once a round, there and back again in the next, for `seconds` and LEAST_ROUNDS."""
    times, names = {name: [] for name in steps}, list(steps)
    for step in steps.values():
        step()
    end = time.monotonic() + seconds
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
        names.reverse()
    return times


def rows_of(case: Case, times: dict[str, list[float]], peaks: dict[str, int], args) -> list[dict]:
    """One row a loss, ratios taken within each round."""
    rows = []
    for name, milliseconds in times.items():
        q1, median, q3 = quartiles(milliseconds)
        speedup = ratio_quartiles(times[OPEN_CLIP], milliseconds)
        ratio = ratio_quartiles(milliseconds, times[FLOOR])
        rows.append(
            {
                "case": str(case),
                "loss": name,
                "device": args.device,
                "threads": args.threads,
                "dtype": args.dtype,
                "rounds": len(milliseconds),
                "q1_ms": round(q1, 3),
                "median_ms": round(median, 3),
                "q3_ms": round(q3, 3),
                "speedup_over_open_clip": round(speedup[1], 3),
                "speedup_quartiles": [round(speedup[0], 3), round(speedup[2], 3)],
                "ratio_to_four_matmuls": round(ratio[1], 3),
                "peak_extra_bytes": peaks[name],
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """The rows of one case as a table."""
    print(f"\n{rows[0]['case']}, {rows[0]['dtype']}, {rows[0]['device']}, {rows[0]['rounds']} rounds")
    print(f"{'loss':14} {'ms':>9} {'quartiles':>19} {'speed-up':>9} {'/4 products':>12} {'peak extra MB':>14}")
    for row in rows:
        print(
            f"{row['loss']:14} {row['median_ms']:9.2f} {row['q1_ms']:9.2f} {row['q3_ms']:9.2f} "
            f"{row['speedup_over_open_clip']:9.2f} {row['ratio_to_four_matmuls']:12.2f} "
            f"{row['peak_extra_bytes'] / 1e6:14.1f}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_cost", description="Time and memory of one loss.")
    parser.add_argument(
        "cases", nargs="*", type=Case.parse, metavar="bxBxd",
        help=f"pairs a rank x pairs of the global batch x width (default: {' '.join(CASES)})",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="of the features; amp_bf16: float32 under autocast, as in training (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help="default: all of FastCLIP's"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help=f"a case, but at least {LEAST_ROUNDS} rounds (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of loss_cost.jsonl")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.device_count():
        parser.error("--device cuda: torch finds no GPU here")
    cases = args.cases or [Case.parse(case) for case in CASES]
    torch.set_num_threads(args.threads)
    names = [OPEN_CLIP, FLOOR, *args.losses]
    tasks = [(case, name) for case in cases for name in names]
    # Memory first: its processes are forks, which a parent that uses a GPU cannot have.
    peaks = {
        (case, name): in_processes(1, extra_bytes, name, case, args.device, args.dtype)[0]
        for case, name in tqdm(tasks, desc="memory", disable=None)
    }
    allow_tf32()
    rows = []
    for case in cases:
        features = Features(case, args.device, args.dtype)
        steps = {name: make_step(name, case, features) for name in names}
        times = alternate(steps, args.seconds, args.device)
        rows += rows_of(case, times, {name: peaks[case, name] for name in names}, args)
        show(rows[-len(names) :])
    finish("loss_cost", argv, rows, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

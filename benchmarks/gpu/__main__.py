"""Whether the loss is right on this GPU and what it costs there, in nine minutes.

    python -m benchmarks.gpu [--device cuda] [--small] [--parts accuracy loss-time ...] [--budget 530]

Each part runs in a process of its own with a time limit; one that fails, hangs or breaks the GPU's context is ended,
and the next begins. One that has no time left is left out. Each row is appended to benchmarks/results/gpu.jsonl and
compared with the last one of the same card. The exit code is 1 if a check failed or a part did not come to its end.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from open_clip_train_fastclip.errors import UserError

from ..harness.command import exit_code_of
from ..harness.records import RESULTS, append, circumstances
from . import stored
from .forked import Failed, forked
from .measurement import Settings, row
from .parts import BUDGET_S, PARTS

LEAST_S = 10  # left for a part to be worth a start
SMALL_FACTOR = 6  # of the limits on a CPU
DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    settings = Settings(args.device, args.small)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, for calls that OpenCLIP and we need
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here: --device cpu --small runs the same parts on a CPU")
    try:
        [common] = forked(described, argv, args, limit_s=60)
    except Failed as failed:
        raise UserError(f"the machine cannot be described: {failed}") from None
    earlier = stored.read(dict.fromkeys((RESULTS.resolve(), args.results.resolve())))
    kept = []
    for number, name in enumerate(args.parts, 1):
        left = args.budget - (time.monotonic() - start)
        limit = min(PARTS[name].limit_s * (SMALL_FACTOR if args.small else 1), left)
        print(f"\n[{number}/{len(args.parts)}] {name}, at most {limit:.0f} s", flush=True)
        if left < LEAST_S:
            rows = [row("left out", {}, {"seconds_left": round(left, 1)}, False)]
        else:
            rows = list(rows_of(name, settings, limit))
        rows = [{"part": name, "device": args.device, **found} for found in rows]
        append(args.results / stored.NAME, rows, common)
        kept += rows
        show(rows, PARTS[name].shown)
        for found in rows:
            for line in stored.changes(found | common, earlier):
                print(f"    {label(found)}: {line}")
    return verdict(kept, time.monotonic() - start)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The check on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"in this order (default: {' '.join(PARTS)})")  # fmt: skip
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts (default: %(default)s)")
    parser.add_argument("--commit", help="of the code, for a copy of it without git")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu.jsonl")
    return parser.parse_args(argv)


def described(argv: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What all rows have in common; it asks the GPU, so it runs in a fork."""
    common = circumstances("benchmarks.gpu", argv)
    common["commit"] = args.commit or common["commit"]
    common["versions"]["cuda"] = torch.version.cuda
    if args.device == "cuda":
        common["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        answer = subprocess.run(DRIVER, capture_output=True, text=True, check=True).stdout
        common["machine"]["driver"] = answer.splitlines()[0].strip()
    yield common


def rows_of(name: str, settings: Settings, limit_s: float) -> Iterator[dict[str, Any]]:
    """The rows of a part, with one more that says why it did not come to its end."""
    start = time.monotonic()
    try:
        yield from forked(PARTS[name].rows, settings, limit_s=limit_s)
    except Failed as failed:
        yield row("not finished", {}, {"error": str(failed)}, False)
    print(f"{time.monotonic() - start:.1f} s")


def label(found: dict[str, Any]) -> str:
    """Name and case of a row in one line."""
    return " ".join([found["name"], *(str(value) for value in found["case"].values())])


def show(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """One line a row: its figures of these names, all that explain a failure, and whether it is right."""
    width = max((len(label(found)) for found in rows), default=0)
    for found in rows:
        figures = found["figures"]
        chosen = figures if found["ok"] is False else {name: figures[name] for name in names if name in figures}
        text = "  ".join(f"{name} {_short(value)}" for name, value in chosen.items())
        print(f"{label(found):{width}}  {text}  {_MARKS[found['ok']]}".rstrip(), flush=True)


_MARKS = {None: "", True: "ok", False: "FAILED"}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(rows: list[dict[str, Any]], seconds: float) -> int:
    """Print what failed; the exit code."""
    judged = [found for found in rows if found["ok"] is not None]
    failed = [found for found in judged if not found["ok"]]
    print(f"\n{len(judged)} checks in {seconds:.0f} s, {len(failed)} failed")
    for found in failed:
        print(f"  {found['part']}: {label(found)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""What every measurement is kept with: command, versions, machine and date, a line each in benchmarks/results/."""

import json
import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import open_clip_train_fastclip

RESULTS = Path(__file__).parents[1] / "results"
QUICK = Path("runs", "quick")  # results of benchmarks.run --quick
PACKAGES = ("torch", "open_clip_torch")
SETTINGS = ("OMP_", "MALLOC_", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES")  # of the environment, that change a timing


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value three times that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def ratio_quartiles(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of values that were measured one after the other."""
    return quartiles([n / d for n, d in zip(numerators, denominators, strict=True)])


def cpu_model() -> str:
    """The processor's name as Linux gives it, else what Python knows of it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the code, with -dirty after it if code differs from it; None without git."""
    git = ["git", "-C", str(RESULTS.parents[1])]
    changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    try:
        found, changed = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in ([*git, "rev-parse", "--short=12", "HEAD"], changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-dirty" if changed else found


def versions() -> dict[str, str | None]:
    """Of Python and what the numbers depend on; None for a package that is on the path without being installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"open-clip-train-fastclip": open_clip_train_fastclip.__version__}


def circumstances(module: str, argv: Sequence[str]) -> dict:
    """Command, versions, commit, machine and date: what has to be known to judge a number or to make it again."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "environment": {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)},
        },
    }


def append(path: Path, rows: list[dict], common: dict) -> None:
    """One line a row, with what is common to all, after all older ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | common) + "\n")


def finish(name: str, argv: Sequence[str], rows: list[dict], folder: Path) -> None:
    """Append the rows to NAME.jsonl in `folder` and print them as one line of JSON."""
    append(folder / f"{name}.jsonl", rows, circumstances(f"benchmarks.{name}", argv))
    print(json.dumps({"rows": rows}), flush=True)

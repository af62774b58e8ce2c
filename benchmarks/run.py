"""Runs what is missing of a table, or of all.

    python -m benchmarks.run TABLE --scale tiny|real|medium|large|xlarge [--launcher local|slurm] [--dry-run]

A finished run is found in benchmarks/results/runs.jsonl by its settings, whichever table it was run for, and never
repeated; a failed one is tried again. `python -m benchmarks.report` shows the outcome.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from open_clip_train_fastclip.errors import UserError

from . import tables
from .experiments import cluster, local
from .experiments.store import Store
from .experiments.table import LOCAL, SCALES, Row
from .harness.command import exit_code_of, positive
from .harness.records import QUICK, RESULTS


def planned(names: list[str], scale: str, seeds: int, quick: bool = False) -> list[tuple[Row, int]]:
    """Every (row, seed) of the tables at a scale, in order."""
    rows = [row for name in names for row in tables.load(name).rows_at(scale, quick)]
    runs = [(row, seed) for row in rows for seed in range(min(seeds, row.seeds))]
    # These take hours: every row has a seed before any has its next, so that they leave a table wherever they stop.
    return sorted(runs, key=lambda run: run[1]) if scale == "real" else runs


def run_local(args, store: Store) -> int:
    """Trains on this machine; returns the exit code."""
    rows = planned(args.tables, args.scale, args.seeds, args.quick)
    possible = [(row, seed) for row, seed in rows if local.has_device(row)]
    if len(possible) < len(rows):
        print(f"left out: {len(rows) - len(possible)} runs on a GPU, since torch sees none here", flush=True)
    wanted = store.missing(local.by_key(possible))
    if args.dry_run:
        for row, seed in wanted:
            print(shlex.join(["python", *local.make_run(row, seed, "").command]))
        return 0
    runs = local.run_all(wanted, store, args.jobs)
    return 1 if any(run.error for run in runs) else 0


def run_larger(args, store: Store) -> int:
    """Submits to SLURM, or trains on this machine's GPUs; returns the exit code."""
    local = args.launcher == "local"
    gpus = cluster.require_gpus_and_data(args.scale) if local else 0
    rows = planned(args.tables, args.scale, args.seeds)
    jobs = [cluster.Job(row, args.scale, seed) for row, seed in rows if not (local and row.nodes)]
    if len(jobs) < len(rows):
        print("left out: the rows that are about the number of nodes, which take --launcher slurm")
    missing = store.missing({job.key: job for job in jobs})
    if args.dry_run:
        for job in missing:
            print(shlex.join(["python", *job.local_run(gpus).command] if local else job.submission))
        return 0
    cluster.require_imagenet(missing)
    return cluster.run_here(missing, store, gpus) if local else cluster.submit(missing, store)


def run(args) -> int:
    """Runs what the arguments ask for; returns the exit code. Raises UserError for what does not go together."""
    names = list(tables.QUICK_NAMES if args.quick else tables.NAMES) if args.tables == ["all"] else args.tables
    args.tables = [name for name in names if args.scale in tables.load(name).scales]
    if args.quick and args.scale != "tiny":
        raise UserError(f"--quick is of scale tiny: leave it out, or --scale {args.scale}")
    if not args.tables:
        scales = ", ".join(tables.load(names[0]).scales)
        raise UserError(f"{', '.join(names)}: there is no --scale {args.scale} of it: take {scales}")
    store = Store(args.results or (QUICK if args.quick else RESULTS))
    if args.scale not in LOCAL:
        args.launcher = args.launcher or "slurm"
        return run_larger(args, store)
    if args.launcher == "slurm":
        raise UserError(f"--scale {args.scale} runs on this machine: leave --launcher slurm out")
    return run_local(args, store)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 (a run failed) or 2 (wrong input)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run what is missing of a table.")
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=f"all, or some of {', '.join(tables.KNOWN)}")
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), help="default: local at scales tiny and real, else slurm"
    )
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=3, help="most seeds of a row (default: 3)")
    parser.add_argument(
        "--jobs", type=positive, default=2, help="runs at a time on this machine (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed and a third of the epochs; all is without the map and tuning"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument("--results", type=Path, help=f"folder of runs.jsonl (default: {RESULTS}, --quick: {QUICK})")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    return exit_code_of(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

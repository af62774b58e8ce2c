"""Where the time of a training step goes, from the traces that --profile left in a run's folder.

    python -m benchmarks.step_time logs/RUN

Traces of GPUs are broken down as in the FastCLIP paper: computation (kernels and copies that are not NCCL's), pure
communication (NCCL's kernels while nothing else runs), how much of the communication overlaps with computation, and
others (nothing runs). Traces of CPUs with gloo: forward, loss, backward, optimizer, data (getting a batch), waiting
(for a collective), others, and collectives, which may run beside any of them. Prints milliseconds a step of every
rank; the last line is JSON, and each row is appended to benchmarks/results/step_time.jsonl.
"""

import argparse
import sys
from pathlib import Path

from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.training.profiling import FOLDER

from .experiments.run_log import read_settings
from .harness.command import exit_code_of
from .harness.records import RESULTS, finish
from .harness.trace_times import read_trace, step_times

# What is kept of a run's settings with its rows: our name, the flag's.
SETTINGS = {"algorithm": "loss"} | {name: name for name in ("model", "batch_size", "accum_freq", "world_size")}


def rows_of(run: Path) -> list[dict]:
    """One row a rank: settings of the run, milliseconds a step by part. Raises UserError if there are no traces."""
    traces = sorted((run / FOLDER).glob("rank-*.json.gz"))
    if not traces:
        raise UserError(f"{run / FOLDER} holds no traces: train with --profile, for 22 steps or more an epoch")
    settings = read_settings(run)
    common = {"run": run.name} | {name: settings[flag] for name, flag in SETTINGS.items() if flag in settings}
    return [
        common | {"rank": int(path.name.split("-")[1].split(".")[0])} | step_times(read_trace(path)) for path in traces
    ]


def show(rows: list[dict]) -> None:
    """The rows as a table, in ms a step."""
    columns = list(rows[0])[list(rows[0]).index("steps") + 1 :]
    print(f"{rows[0]['run']}: ms a step, mean of {rows[0]['steps']} steps, {rows[0]['kind']}")
    print("rank " + " ".join(f"{name:>{max(9, len(name))}}" for name in columns))
    for row in rows:
        print(f"{row['rank']:4} " + " ".join(f"{row[name]:{max(9, len(name))}.2f}" for name in columns), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 (no traces, or broken ones)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description="Where a step's time goes.")
    parser.add_argument("run", type=Path, help="folder of a run that was trained with --profile")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step_time.jsonl")
    args = parser.parse_args(argv)

    def measure() -> int:
        rows = rows_of(args.run)
        show(rows)
        finish("step_time", argv, rows, args.results)
        return 0

    return exit_code_of(measure)


if __name__ == "__main__":
    sys.exit(main())

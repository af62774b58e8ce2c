"""What `make quickstart` runs: OpenCLIP and FastCLIP trained side by side on glyph data, and a table of both.

    python -m benchmarks.quickstart [--mismatched 0.3] [--losses clip clip-frozen fastclip-v1 fastclip-v3] [--jobs 2]

The rows are those of tables/quickstart.py. A finished run is found in runs/quickstart/runs.jsonl and not repeated;
remove the folder to begin anew. The table (table.md, table.json) and the curves (curves.png) lie beside it.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from .experiments import local, plots
from .experiments.measured import Measured
from .experiments.sections import RECALL_COLUMNS, figures, markdown
from .experiments.store import Store
from .experiments.table import Row
from .glyph_data import dataset
from .harness.command import exit_code_of, positive
from .tables.quickstart import TABLE, rows

DEFAULT_LOSSES = ("clip", "clip-frozen", "fastclip-v1", "fastclip-v3")
COLUMNS = RECALL_COLUMNS | {"tau": "final tau", "samples_per_second": "samples/s", "minutes": "minutes"}


def compare(chosen: list[Row], jobs: int) -> int:
    """Makes the data, trains what is not trained yet and prints the table; 1 if a run failed."""
    folders = chosen[0].kept
    info = dataset.make(folders.data, chosen[0].data)
    print(f"data: {folders.data}, see {folders.data}/contact_sheet.png; runs: {folders.runs}", flush=True)
    store = Store(folders.runs)
    local.run_all(store.missing(local.by_key([(row, 0) for row in chosen])), store, jobs)
    measured = [Measured(row, "tiny", store, {}) for row in chosen]
    print("\n" + write_table(measured, info, folders.runs))
    return 1 if any(m.failed for m in measured) else 0


def write_table(measured: list[Measured], info: dict, folder: Path) -> str:
    """Writes table.md, table.json and curves.png to `folder`; returns the text of table.md.

    `info` is the data's dataset.json. Recall is in percent; a failed run is named with its last line.
    """
    lines = [[m.row.label, "failed" if m.failed else str(m.row.batch), *figures(m, COLUMNS)] for m in measured]
    table = markdown(["loss", "batch", *COLUMNS.values()], lines, aligned=True)
    text = "\n\n".join([_heading(measured, info), table, _footer(measured, info)]) + "\n"
    (folder / "table.md").write_text(text)
    data = {key: info[key] for key in ("settings", "train_pairs", "mismatched_pairs", "val_pairs", "floor", "sha256")}
    facts = {"data": data, "rows": [_facts(m) for m in measured]}
    (folder / "table.json").write_text(json.dumps(facts, indent=1) + "\n")
    plots.draw_curves(measured, "tiny", folder / "curves.png", info["floor"]["R@1"])
    return text


def _facts(m: Measured) -> dict:
    (run,) = (*m.done, *m.failed)
    row = {"loss": m.row.label, "command": run["command"]}
    if m.failed:
        return row | {"failed": run["error"]}
    return row | {"batch": m.row.batch} | {name: round(m.metric(name).mean, 4) for name in COLUMNS}


def _heading(measured, info) -> str:
    share = f"{100 * info['mismatched_pairs'] / info['train_pairs']:g}%"
    wrong = f"{share} of their captions are wrong" if info["mismatched_pairs"] else "all of their captions are right"
    return (
        f"**Glyph data: {info['train_pairs']:,} training pairs, {wrong}; "
        f"recall (%) on {info['val_pairs']:,} held-out pairs, all right** "
        f"({measured[0].row.epochs} epochs, one seed, one CPU thread a run)"
    )


def _footer(measured, info) -> str:
    floor = info["floor"]
    failures = [f"{m.row.label} failed: {run['error']}\n" for m in measured for run in m.failed]
    return "".join(failures) + (
        "Knowing size, colours, frame and background but not the character would give "
        f"R@1 {floor['R@1']:.1f} and R@5 {floor['R@5']:.1f}, both ways."
    )


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 (a run failed) or 2 (wrong input)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    losses = [row.name for row in TABLE.rows]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart", description="Train OpenCLIP and FastCLIP side by side on glyph data."
    )
    parser.add_argument(
        "--mismatched", type=float, default=dataset.Settings.mismatched, metavar="SHARE",
        help="share of the training captions exchanged at random among themselves, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--losses", nargs="+", choices=losses, default=list(DEFAULT_LOSSES), metavar="LOSS",
        help=f"the rows of the table, from: {', '.join(losses)} (default: {' '.join(DEFAULT_LOSSES)})",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=positive, default=cores, metavar="N",
        help="runs at a time, one thread each (default: one a core, here %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    by_name = {row.name: row for row in rows(args.mismatched)}
    chosen = [by_name[name] for name in dict.fromkeys(args.losses)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
    return exit_code_of(lambda: compare(chosen, args.jobs))


if __name__ == "__main__":
    sys.exit(main())

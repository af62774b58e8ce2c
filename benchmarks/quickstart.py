"""What `make quickstart` runs: OpenCLIP and FastCLIP trained side by side on the same data, and a table of both.

    python -m benchmarks.quickstart [--data glyphs|real] [--losses clip clip-frozen fastclip-v1 fastclip-v3] [--jobs 2]

The rows are those of tables/quickstart.py. A finished run is found in runs/quickstart/runs.jsonl (with --data real in
runs/quickstart-real) and not repeated; remove the folder to begin anew. The table (table.md, table.json) and the curves
(curves.png) lie beside it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from open_clip_train_fastclip.errors import UserError

from .experiments import local, plots
from .experiments.local_data import data_of
from .experiments.measured import Measured
from .experiments.real_pairs import TENTH
from .experiments.sections import RECALL_COLUMNS, figures, markdown
from .experiments.store import Store
from .experiments.table import Row
from .glyph_data import dataset as glyphs
from .harness.command import exit_code_of, positive
from .tables.quickstart import TABLE, rows

DEFAULT_LOSSES = ("clip", "clip-frozen", "fastclip-v1", "fastclip-v3")
COLUMNS = RECALL_COLUMNS | {"tau": "final tau", "samples_per_second": "samples/s", "minutes": "minutes"}
REAL_COLUMNS = RECALL_COLUMNS | {"R@1 new": "R@1, new captions"} | COLUMNS
FACTS = ("settings", "train_pairs", "mismatched_pairs", "val_pairs", "floor", "sha256")  # of dataset.json, where it is


def run(args) -> int:
    """Compares what the arguments ask for; returns the exit code. Raises UserError."""
    if args.data == "real" and args.mismatched is not None:
        raise UserError(
            "--mismatched is of --data glyphs: leave it out, the captions of the real pairs are as they are"
        )
    share = glyphs.Settings.mismatched if args.mismatched is None else args.mismatched
    by_name = {row.name: row for row in rows(TENTH if args.data == "real" else glyphs.Settings(mismatched=share))}
    return compare([by_name[name] for name in dict.fromkeys(args.losses)], args.jobs)


def compare(chosen: list[Row], jobs: int) -> int:
    """Makes the data, trains what is not trained yet and prints the table; 1 if a run failed."""
    folders, data = chosen[0].kept, data_of(chosen[0])
    info = data.make()
    print(f"data: {folders.data}, see {folders.data}/contact_sheet.png; runs: {folders.runs}", flush=True)
    store = Store(folders.runs)
    local.run_all(store.missing(local.by_key([(row, 0) for row in chosen])), store, jobs)
    measured = [Measured(row, data.scale, store, {}) for row in chosen]
    print("\n" + write_table(measured, info, folders.runs))
    return 1 if any(m.failed for m in measured) else 0


def write_table(measured: list[Measured], info: dict, folder: Path) -> str:
    """Writes table.md, table.json and curves.png to `folder`; returns the text of table.md.

    `info` is the data's dataset.json. Recall is in percent; a failed run is named with its last line.
    """
    scale = measured[0].scale
    heading, note = _said_of_real(info) if scale == "real" else _said_of_glyphs(info)
    columns = REAL_COLUMNS if scale == "real" else COLUMNS
    lines = [[m.row.label, "failed" if m.failed else str(m.row.batch), *figures(m, columns)] for m in measured]
    table = markdown(["loss", "batch", *columns.values()], lines, aligned=True)
    heading = f"**{heading}** ({measured[0].row.epochs} epochs, one seed, one CPU thread a run)"
    failures = "".join(f"{m.row.label} failed: {run['error']}\n" for m in measured for run in m.failed)
    text = f"{heading}\n\n{table}\n\n{failures}{note}\n"
    (folder / "table.md").write_text(text)
    data = {key: info[key] for key in FACTS if key in info}
    data["train_pairs"] = data_of(measured[0].row).train_pairs  # of real pairs a part of those in the folder
    facts = {"data": data, "rows": [_facts(m, columns) for m in measured]}
    (folder / "table.json").write_text(json.dumps(facts, indent=1) + "\n")
    plots.draw_curves(measured, scale, folder / "curves.png", info.get("floor", {}).get("R@1"))
    return text


def _facts(m: Measured, columns: dict[str, str]) -> dict:
    (run,) = (*m.done, *m.failed)
    row = {"loss": m.row.label, "command": run["command"]}
    if m.failed:
        return row | {"failed": run["error"]}
    return row | {"batch": m.row.batch} | {name: round(m.metric(name).mean, 4) for name in columns}


def _said_of_glyphs(info: dict) -> tuple[str, str]:
    """What stands above and below the table."""
    share = f"{100 * info['mismatched_pairs'] / info['train_pairs']:g}%"
    wrong = f"{share} of their captions are wrong" if info["mismatched_pairs"] else "all of their captions are right"
    floor = info["floor"]
    return (
        f"Glyph data: {info['train_pairs']:,} training pairs, {wrong}; "
        f"recall (%) on {info['val_pairs']:,} held-out pairs, all right",
        "Knowing size, colours, frame and background but not the character would give "
        f"R@1 {floor['R@1']:.1f} and R@5 {floor['R@5']:.1f}, both ways.",
    )


def _said_of_real(info: dict) -> tuple[str, str]:
    return (
        f"Real pairs: {TENTH.pairs:,} training pairs of emoji, icons and clip art as people named them; "
        f"recall (%) on {info['val_pairs']:,} held-out pairs",
        f"New captions: {info['splits']['val_new']:,} more pairs, whose captions occur nowhere in the training data.",
    )


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 (a run failed) or 2 (wrong input)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    losses = [row.name for row in TABLE.rows]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart", description="Train OpenCLIP and FastCLIP side by side on the same data."
    )
    parser.add_argument(
        "--data", choices=("glyphs", "real"), default="glyphs",
        help="drawn characters, or pairs that people made, for which npm and apt-get download 0.3 GB of packages "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mismatched", type=float, metavar="SHARE",
        help="share of the glyphs' training captions exchanged at random among themselves, 0 to 1 "
        f"(default: {glyphs.Settings.mismatched})",
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
    return exit_code_of(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

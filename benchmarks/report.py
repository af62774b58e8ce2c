"""Renders everything that was run into benchmarks/results/REPORT.md, with its plots.

    python -m benchmarks.report

Nothing is run. A row without a finished run shows as "not run", or as failed with its log's last line.
"""

import argparse
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from . import tables
from .experiments import local
from .experiments.measured import read_evaluations
from .experiments.sections import section
from .experiments.store import DONE, Store, key_of
from .experiments.table import LOCAL, NOISY
from .harness.records import QUICK, RESULTS

INTRODUCTION = """# Results

Made by `python -m benchmarks.report` from [runs.jsonl](runs.jsonl), which holds command, versions, machine, date and
outcome of every run. Cells are means over the seeds, with the standard deviation of one seed in brackets; scores are
in percent. `python -m benchmarks.run TABLE --scale SCALE` runs what is missing. Published numbers are from
[benchmarks/published](../published), with their sources; beside scale tiny they are of the medium setting (CC3M,
RN50), to compare signs and not sizes.
"""
TINY = """**Scale tiny**: the quickstart's model on glyph data, {epochs} epochs of {train_pairs:,} training pairs, 30%
of them with a wrong caption unless a row says otherwise. Recall is over 2,000 held-out pairs; zero-shot is the
share of their pictures whose character is recognised among 150. Knowing everything but the character gives R@1
{floor1:.1f} and R@5 {floor5:.1f}, both ways; chance of zero-shot is 0.7 (top 1) and 3.3 (top 5). The settings were
tuned on 1,000 other pairs ([Tuning](#tuning)).
"""
REAL = """**Scale real**: the same model, unless a row says otherwise on 12 epochs of 10,086 training pairs of emoji,
icons, clip art and stamps with the words that people gave them. R@1 and R@10 are over 2,000 held-out pairs; R@1 new is
over 1,000 pairs whose captions occur nowhere in the training data. Zero-shot is the share of the pictures of emoji
among both whose theme, of the 100 of Unicode, is recognised by the names of its emoji; the linear probe that of a
logistic regression on the features of the run's own training pictures. The settings were tuned on 1,000 other pairs
([Tuning on real pairs](#tuning-on-real-pairs)).
"""


def circumstances(rows: list[dict]) -> str:
    """Machines, versions, dates and hours of the finished runs, counted."""
    counted = {
        "machine": Counter(_machine(row["machine"]) for row in rows),
        "versions": Counter(", ".join(f"{name} {of}" for name, of in row["versions"].items()) for row in rows),
        "commit": Counter(str(row.get("commit")) for row in rows),
    }
    hours = sum(row.get("seconds") or 0 for row in rows) / 3600
    dates = sorted(row["date"] for row in rows)
    lines = [f"{len(rows)} finished runs, {hours:.1f} hours in all, {dates[0]} to {dates[-1]}."]
    lines += [f"{what}: " + "; ".join(f"{of} ({n} runs)" for of, n in c.most_common()) for what, c in counted.items()]
    return "\n".join(f"- {line}" for line in lines)


def _machine(facts: dict) -> str:
    return ", ".join(f"{name} {facts[name]}" for name in ("cpu", "cores", "gpu", "nodes", "gpus") if facts.get(name))


def render(folder: Path, quick: bool = False) -> str:
    """Draws the plots of what is stored in `folder` and returns the report."""
    store, evaluations = Store(folder), read_evaluations(folder)
    done = [row for row in store.rows.values() if row["status"] == DONE]
    others = [tables.load(name) for name in tables.NAMES if name != "map"]  # which has other rates beside the chosen
    chosen = [table for table in others if table.kind != "tuning"]
    rows = [row for table in chosen for scale in LOCAL for row in table.rows_at(scale, quick)]
    used = {key_of(local.settings_of(row, 0)) for row in rows}
    text = [INTRODUCTION.strip(), circumstances(done) if done else "Nothing was run yet."]
    usual = next((row for row in done if row["scale"] == "tiny" and row["settings"]["data"] == asdict(NOISY)), None)
    if usual:
        facts = {"epochs": usual["settings"]["epochs"], "train_pairs": usual["train_pairs"]}
        text.append(TINY.strip().format(**facts, floor1=usual["floor"]["R@1"], floor5=usual["floor"]["R@5"]))
    if any(row["scale"] == "real" for row in done):
        text.append(REAL.strip())
    sections = [section(name, tables.load(name), store, evaluations, used, quick) for name in tables.NAMES]
    return "\n\n".join([*text, *sections]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Render what was run.")
    parser.add_argument("--quick", action="store_true", help="what benchmarks.run --quick made")
    parser.add_argument("--results", type=Path, help=f"folder of the rows and the report (default: {RESULTS})")
    args = parser.parse_args(argv)
    folder = args.results or (QUICK if args.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "REPORT.md").write_text(render(folder, args.quick))
    print(f"{folder / 'REPORT.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

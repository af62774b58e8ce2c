"""Renders everything that was run into benchmarks/results/REPORT.md, with its plots.

    python -m benchmarks.report

Nothing is run. The report has three parts: the tables at scale real, at scale tiny, and at the larger scales, where
one line says what runs a table of which nothing was run.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from . import tables
from .experiments import local, sections
from .experiments.measured import Measured, read_evaluations
from .experiments.store import DONE, Store, key_of
from .experiments.table import LARGER, LOCAL, NOISY
from .harness.records import QUICK, RESULTS

PARTS = {  # heading: scales
    "Part 1: real pairs": ("real",),
    "Part 2: glyphs": ("tiny",),
    "Part 3: ready for a cluster": LARGER,
}
INTRODUCTION = """# Results

Made by `python -m benchmarks.report` from [runs.jsonl](runs.jsonl), which holds command, versions, machine, commit,
date and outcome of every run.

How to read a cell: 21.0 (1.4) is the mean over the seeds and the standard deviation of one seed, a figure alone is of
one seed. A gain is the mean over the seeds that both rows have, with its standard error. Scores are in percent; seeds
counts the finished runs. Published numbers are from [benchmarks/published](../published), with their sources. At
scales tiny and real eps is 1e-14 in every row that names no other (the default is 1e-4 since).
"""
TINY = """The quickstart's model on glyph data (scale tiny), {epochs} epochs of {train_pairs:,} training pairs, 30% of
them with a wrong caption unless a row says otherwise. Recall is over 2,000 held-out pairs; zero-shot is the share of
their pictures whose character is recognised among 150. Knowing everything but the character gives R@1 {floor1:.1f} and
R@5 {floor5:.1f}, both ways; chance of zero-shot is 0.7 (top 1) and 3.3 (top 5). The settings were tuned on 1,000 other
pairs ([Tuning](#tuning)). Published numbers beside these are of the medium setting (CC3M, RN50), to compare signs and
not sizes.
"""
REAL = """The quickstart's model (scale real), unless a row says otherwise on 12 epochs of 10,086 training pairs of
emoji, icons, clip art and stamps with the words that people gave them. R@1 and R@10 are over 2,000 held-out pairs; R@1
new is over 1,000 pairs whose captions occur nowhere in the training data. Zero-shot is the share of the pictures of
emoji among both whose theme, of the 100 of Unicode, is recognised by the names of its emoji; the linear probe that of a
logistic regression on the features of the run's own training pictures. The settings were tuned on 1,000 other pairs
([Tuning on real pairs](#tuning-on-real-pairs)).
"""
CLUSTER = """Scales medium (CC3M, RN50), large (CC12M, ViT-B-32) and xlarge (LAION400M, ViT-B-16) have the recipes of
[scripts/slurm](../../scripts/slurm/recipes).
"""
NOTHING_RUN = """Not run yet; a command submits its runs to SLURM (with `--dry-run` it prints them). Beside it stands
what is published, at the recipe's number of nodes unless others are named.
"""


def circumstances(rows: list[dict]) -> str:
    """Machines, versions, dates, hours and commits of the finished runs, counted."""
    rows = sorted(rows, key=lambda row: row["date"])
    commits = list(dict.fromkeys(str(row.get("commit")) for row in rows))
    hours = sum(row.get("seconds") or 0 for row in rows) / 3600
    first, last = (row["date"][:10] for row in (rows[0], rows[-1]))
    lines = [
        f"{len(rows)} finished runs, {hours:.1f} hours in all, {first} to {last}, of {len(commits)} states of the code"
    ]
    counted = {
        "Machines": Counter(_machine(row["machine"]) for row in rows),
        "Versions": Counter(", ".join(f"{name} {of}" for name, of in row["versions"].items()) for row in rows),
    }
    lines += [f"{what}: " + "; ".join(f"{of} ({n} runs)" for of, n in c.most_common()) for what, c in counted.items()]
    return "\n".join(f"- {line}" for line in lines)


def _machine(facts: dict) -> str:
    return ", ".join(f"{name} {facts[name]}" for name in ("cpu", "cores", "gpu", "nodes", "gpus") if facts.get(name))


def anchor(heading: str) -> str:
    """What a link to a heading ends with on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def render(folder: Path, quick: bool = False) -> str:
    """Draws the plots of what is stored in `folder` and returns the report; `quick`: of scale tiny alone."""
    store, evaluations = Store(folder), read_evaluations(folder)
    done = [row for row in store.rows.values() if row["status"] == DONE]
    used = _used(quick)
    contents, parts = [], []
    for title, scales in PARTS.items():
        if quick and "tiny" not in scales:
            continue
        links, shown, lines = [], [], []
        for name, table, scale in _tables_at(scales):
            measured = [Measured(row, scale, store, evaluations) for row in table.rows_at(scale, quick)]
            if scale in LOCAL or any(m.done or m.failed for m in measured):
                links.append(f"{_link(sections.heading(table, scale))} (`{name}`)")
                shown.append(sections.section(name, table, scale, measured, used, folder, quick))
            else:
                lines.append(sections.cluster_line(name, table, scale, measured))
        contents.append(f"- {_link(title)}" + (f": {', '.join(links)}" if links else ""))
        parts += [f"## {title}", _about(scales[0], done), *shown]
        if lines:
            parts += [NOTHING_RUN.strip(), sections.markdown(["table", "scale", "command", "published"], lines)]
    head = [
        INTRODUCTION.strip(),
        circumstances(done) if done else "Nothing was run yet.",
        "## Contents",
        "\n".join(contents),
    ]
    return "\n\n".join(filter(None, [*head, *parts])) + "\n"


def _tables_at(scales):
    """Name, table and scale of each; those that are of other data first come later, and those of tuning last."""
    named = [(name, tables.load(name)) for name in tables.NAMES]
    named.sort(key=lambda item: (item[1].kind == "tuning", item[1].scales[0] not in scales))
    return [(name, table, scale) for name, table in named for scale in scales if scale in table.scales]


def _used(quick):
    """Keys of the settings that the tables take from tuning."""
    # These two have other settings beside the chosen.
    others = [tables.load(name) for name in tables.NAMES if name not in ("map", "eps")]
    chosen = [table for table in others if table.kind != "tuning"]
    rows = [row for table in chosen for scale in LOCAL for row in table.rows_at(scale, quick)]
    return {key_of(local.settings_of(row, 0)) for row in rows}


def _about(scale, done):
    """What is said of a part at its head; `done`: the finished runs."""
    if scale == "tiny":
        usual = next((row for row in done if row["scale"] == "tiny" and row["settings"]["data"] == asdict(NOISY)), None)
        if not usual:
            return ""
        facts = {"epochs": usual["settings"]["epochs"], "train_pairs": usual["train_pairs"]}
        return TINY.strip().format(**facts, floor1=usual["floor"]["R@1"], floor5=usual["floor"]["R@5"])
    return (REAL if scale == "real" else CLUSTER).strip()


def _link(heading):
    return f"[{heading}](#{anchor(heading)})"


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

"""What was measured and what is published for the rows of a table, as figures; report.py and plots.py show them."""

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..harness.records import RESULTS
from . import local
from .cluster import PUBLISHED_NODES, Job, logs
from .local_data import both_ways, data_of
from .run_log import U_FIGURES
from .store import DONE, Store, key_of
from .table import LOCAL, Comparison, Row, Table

PUBLISHED = Path(__file__).parents[1] / "published"
PUBLISHED_LOSSES = {"clip": "openclip"}  # others have our names
DATA_NAMES = {"tiny": "glyphs", "real": "real pairs", "medium": "CC3M", "large": "CC12M", "xlarge": "LAION400M"}
IMAGENET = "imagenet-zeroshot-val-top1"  # as OpenCLIP names it, evaluated during the training


class Figure(NamedTuple):
    """Mean over seeds, standard deviation of one seed (0 for a single one), and number of seeds."""

    mean: float
    std: float
    count: int


def figure(values: Iterable[float]) -> Figure | None:
    """None for no values."""
    values = list(values)
    if not values:
        return None
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


class Measured:
    """The stored runs of one row at one scale, one a seed."""

    def __init__(self, row: Row, scale: str, store: Store, evaluations: dict[tuple[str, str, str], float]):
        self.row, self.scale = row, scale
        if scale in LOCAL:
            keys = [key_of(local.settings_of(row, seed)) for seed in range(row.seeds)]
        else:
            keys = [Job(row, scale, seed).key for seed in range(row.seeds)]
        runs = [run for key in keys if (run := store.get(key))]
        self.done = [run for run in runs if run["status"] == DONE]
        self.failed = [run for run in runs if run["status"] != DONE]
        self._evaluations = evaluations

    def metric(self, name: str) -> Figure | None:
        """A score in percent, None where no run has it.

        At the local scales R@1 (mean of both ways), top1 and top5 (zero-shot) and tuning (R@1 on the tuning pairs). At
        scale tiny one of glyph_scores.RECALLS as well; at scale real R@1 new (on captions that are not in the training
        data), R@10 and probe (linear). At the larger scales a suite of benchmarks.evaluate on the last checkpoint, or
        IMAGENET at the end. At all of them tau and samples_per_second, at the local ones minutes and U_FIGURES.
        """
        return figure(self.by_seed(name).values())

    def by_seed(self, name: str) -> dict[int, float]:
        """The values of `metric`, of each finished seed that has one."""
        values = {run["settings"]["seed"]: self._value(run, name) for run in self.done}
        return {seed: value for seed, value in values.items() if value is not None}

    def _value(self, run, name):
        if name in ("tau", "samples_per_second"):
            return run[name]
        if name in U_FIGURES:
            return run.get("u", {}).get(name)  # runs before it was kept have none
        if name == "minutes":
            return run["seconds"] / 60
        if name == IMAGENET:
            return run["curve"][-1].get(name) if run["curve"] else None
        if self.scale in LOCAL:
            return data_of(self.row).metrics(run["scores"]).get(name)
        flags = run["settings"]["flags"]
        last = f"epoch_{flags.get('--stop-epochs', flags['--epochs'])}.pt"
        return self._evaluations.get((run["name"], last, name))

    def curve(self) -> dict[int, Figure]:
        """Samples seen -> R@1 (mean of both ways); at the larger scales ImageNet top 1, where it was evaluated."""
        points: dict[int, list[float]] = {}
        for run in self.done:
            for point in run["curve"]:
                score = both_ways(point, 1) if self.scale in LOCAL else point.get(IMAGENET)
                if score is not None:
                    points.setdefault(point["samples"], []).append(score)
        return {samples: figure(values) for samples, values in sorted(points.items())}

    def step_time(self) -> dict[str, float]:
        """Milliseconds of a step by part, mean over the ranks of one run; empty without traces."""
        return next((run["step_time"] for run in self.done if run.get("step_time")), {})


def gain(better: Measured, base: Measured, name: str) -> Figure | None:
    """Mean gain over the seeds that both have, with its standard error in place of the deviation.

    By seed, since runs of one seed begin with the same weights and so go up and down together.
    """
    scores, base_scores = better.by_seed(name), base.by_seed(name)
    found = figure(scores[seed] - base_scores[seed] for seed in scores.keys() & base_scores.keys())
    return found and found._replace(std=found.std / math.sqrt(found.count))


def gains_over_openclip(rows: list[Measured], name: str = "R@1") -> list[tuple[Measured, Figure]]:
    """The other losses among rows of one data set and batch, with their gain over the best OpenCLIP row of them."""
    rivals = [m for m in rows if m.row.loss == "clip" and m.metric(name)]
    if not rivals:
        return []
    best = max(rivals, key=lambda m: m.metric(name).mean)
    return [(m, found) for m in rows if m.row.loss != "clip" and (found := gain(m, best, name))]


def fewer_samples(base: dict[int, Figure], better: dict[int, Figure]) -> float | None:
    """base's samples at its end over those at which better's curve first reaches base's final score.

    Between evaluations the curve is a straight line; before the first it starts at 0. None: there is no curve, or it
    does not get there.
    """
    if not base or not better:
        return None
    end = max(base)
    before = (0, 0.0)
    for samples, point in better.items():
        if point.mean >= base[end].mean:
            share = (base[end].mean - before[1]) / (point.mean - before[1])
            return end / (before[0] + share * (samples - before[0]))
        before = samples, point.mean
    return None


def read_evaluations(folder: Path = RESULTS) -> dict[tuple[str, str, str], float]:
    """(run's name, checkpoint's name, suite) -> the newest mean in percent that benchmarks.evaluate stored.

    It stores in `folder`, and for scripts/slurm/eval.sh in a folder of each evaluation in $LOGS.
    """
    paths = [path for path in [folder / "evaluate.jsonl", *logs().glob("eval-*/evaluate.jsonl")] if path.is_file()]
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    evaluations = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if row["kind"] == "mean" and row["value"] is not None:
            checkpoint = Path(row["checkpoint"]).absolute()
            evaluations[checkpoint.parent.parent.name, checkpoint.name, row["suite"]] = 100 * row["value"]
    return evaluations


def published(table: Table, row: Row, scale: str, files: tuple[str, ...] = ()) -> dict[str, str]:
    """Column -> cell as published at `scale`, with the deviation where there is one; empty for what is not published.

    Rows that differ from a published algorithm in their own flags have none.
    """
    if row.flags.keys() - {"--profile"}:
        return {}
    rows = []
    for file in files or table.published:
        with (PUBLISHED / file).open(newline="") as lines:
            rows += [line for line in csv.DictReader(lines) if _is_of(line, row, scale)]
    cells: dict[str, list[str]] = {}
    for line in rows:
        for column, value in line.items():
            if column in ("setting", "nodes", "algorithm", "source", "epochs", "samples_seen_billion") or not value:
                continue
            if not column.endswith("_std"):
                text = f"{value} ({line[f'{column}_std']})" if line.get(f"{column}_std") else value
                cells.setdefault(column, []).append(text + (f" at {line['epochs']} epochs" if "epochs" in line else ""))
    return {column: "; ".join(texts) for column, texts in cells.items()}


def published_gain(table: Table, base: Row, better: Row, scale: str) -> dict[str, str]:
    """Column -> published gain of `better` over `base`: as printed where it is, else from the published scores."""
    if table.published_gaps:
        gaps = published(table, better, scale, (table.published_gaps,))
        return {column: f"+{text}" if column.endswith("_gap") else text for column, text in gaps.items()}
    cells, base_cells = (published(table, row, scale) for row in (better, base))
    return {column: _difference(cell, base_cells[column]) for column, cell in cells.items() if column in base_cells}


def _difference(cell, base_cell):
    """Of two cells of `published`, each with one score or with several at so many epochs."""
    texts = []
    for score, base_score in zip(cell.split("; "), base_cell.split("; "), strict=True):
        value, _, when = score.partition(" at ")
        difference = float(value.split()[0]) - float(base_score.split()[0])
        texts.append(f"{difference:+.2f}" + (f" at {when}" if when else ""))
    return "; ".join(texts)


def _is_of(line, row, scale):
    return (
        line.get("setting", "xlarge") == scale
        and line.get("algorithm", row.loss) == PUBLISHED_LOSSES.get(row.loss, row.loss)
        and ("nodes" not in line or line["nodes"] == str(row.nodes or PUBLISHED_NODES[scale]))
    )


def pairs(table: Table, rows: list[Measured]) -> list[tuple[Comparison, Measured, Measured]]:
    """Each comparison of a table both of whose rows are among `rows`, with these."""
    by_name = {measured.row.name: measured for measured in rows}
    compared = [c for c in table.comparisons if {c.base, c.better} <= by_name.keys()]
    return [(comparison, by_name[comparison.base], by_name[comparison.better]) for comparison in compared]


def series(row: Row) -> str:
    """The row's label without what is said of its data, batch and number of nodes: the name of a line of a plot."""
    return re.sub(r"^.*: |, (batch )?x?\d+$", "", row.label)

"""The figures that README.md, docs/results.md and docs/choosing.md quote are those of the stored runs.

Below a paragraph or a list's item a comment names the source of every figure in it that has a decimal point, as
`<!-- report: 21.0 temperature/v3/R@1; +7.8 gamma_schedule/v1 - sogclr/R@1 -->`: the figure as it is quoted, the table's
name, its row's (of two rows the gain of the first over the second), and the metric.
"""

import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.experiments.measured import Measured, fewer_samples, gain, read_evaluations
from benchmarks.experiments.store import Store

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"(?<![\w.,/])[+-]?\d+\.\d+(?!\w|\.\d)")
FILES = ("README.md", "docs/results.md", "docs/choosing.md")
BLOCKS = [
    (path, block)
    for path in FILES
    for block in re.split(r"\n\n|\n(?=- )", (ROOT / path).read_text())
    if "<!-- report:" in block or (path == "docs/results.md" and block.startswith("- "))  # each of whose items has one
]


def value_of(table_name, rows, metric):
    """The mean over the seeds, or that of a gain, of rows named as `better - base`; "fewer samples" is a factor."""
    table = tables.load(table_name)
    places = [(row, scale) for scale in reversed(table.scales) for row in table.rows_at(scale)]  # the first one wins
    by_name = {row.name: Measured(row, scale, Store(), read_evaluations()) for row, scale in places}
    found = [by_name[name] for name in rows.split(" - ")]
    if metric == "fewer samples":
        better, base = found
        return fewer_samples(base.curve(), better.curve())
    return (gain(*found, metric) if len(found) == 2 else found[0].metric(metric)).mean


@pytest.mark.parametrize(("path", "block"), BLOCKS, ids=lambda part: part[:40])
def test_quoted_figures_are_those_of_the_stored_runs(path, block):
    text, _, mark = block.partition("<!-- report:")
    sources = re.findall(r"(\S+) (.+?)(?:;| -->)", mark)  # a figure may be quoted of two runs
    assert set(QUOTED.findall(text)) == {quoted for quoted, _ in sources}, (
        "a figure without its source, or a source without its figure"
    )
    for quoted, source in sources:
        value, half = value_of(*source.split("/")), 0.5 * 10.0 ** -len(quoted.split(".")[1])
        assert abs(value - float(quoted)) < half + 1e-6, f"{path} says {quoted}, the runs {value:.3f} ({source})"


def test_all_files_quote_figures():
    assert {path for path, _ in BLOCKS} == set(FILES)

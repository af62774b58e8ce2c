"""What the report makes of known rows: means, gains, factors, published numbers, and what was tuned."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.experiments import plots, sections
from benchmarks.experiments.measured import (
    Figure,
    Measured,
    fewer_samples,
    gains_over_openclip,
    published,
    published_gain,
)
from benchmarks.experiments.store import Store
from benchmarks.experiments.table import Comparison, Table
from benchmarks.tables.settings import CLIP, FROZEN, V1, V3


def measured(row, rows, scale="tiny"):
    store = Store(Path("/nonexistent"))
    store.rows = {line["key"]: line for line in rows}
    return Measured(row, scale, store, {})


def test_mean_and_deviation_over_seeds(row_of):
    found = measured(CLIP, [row_of(CLIP, seed, recall) for seed, recall in enumerate((10.0, 12.0, 14.0))])
    assert found.metric("R@1") == Figure(12.0, 2.0, 3) and sections.cell(found.metric("R@1")) == "12.0 (2.0)"
    assert sections.cell(found.metric("top1")) == "1.2 (0.2)"
    one = measured(CLIP, [row_of(CLIP, 0, 10.0)])
    assert sections.cell(one.metric("R@1")) == "10.0" and sections.status(one) == "1"


def test_gain_is_that_of_the_same_seeds_with_its_standard_error(row_of):
    rows = [row_of(CLIP, seed, recall) for seed, recall in enumerate((10.0, 12.0, 14.0))]
    rows += [row_of(V3, seed, recall) for seed, recall in enumerate((20.0, 20.0, 23.0))]
    table = Table("T", "Q", (CLIP, V3), (Comparison("clip", "v3"),))
    text = sections.comparison_table(table, [measured(CLIP, rows), measured(V3, rows)], "tiny")
    # gains of 10, 8 and 9: a deviation of 1 over the root of three seeds
    assert text.splitlines()[-1].startswith("| fastclip-v3 over OpenCLIP | +9.0 (0.6) | +0.9 (0.1) |")
    only_one = measured(V3, [row_of(V3, 1, 20.0)])  # compared with seed 1 alone, not with the mean of three
    assert (
        sections.comparison_table(table, [measured(CLIP, rows), only_one], "tiny")
        .splitlines()[-1]
        .startswith("| fastclip-v3 over OpenCLIP | +8.0 | +0.8 |")
    )


def curve(**points):
    return {int(samples[1:]): Figure(score, 0, 1) for samples, score in points.items()}


@pytest.mark.parametrize(
    ("better", "factor"),
    [
        (curve(s50=10.0, s100=30.0), 100 / 75),  # reaches 20 half way between 50 and 100
        (curve(s50=40.0, s100=50.0), 4.0),  # half way to the first evaluation, from 0
        (curve(s50=20.0, s100=50.0), 2.0),
        (curve(s50=10.0, s100=19.0), None),
        ({}, None),
    ],
)
def test_fewer_samples(better, factor):
    found = fewer_samples(curve(s50=15.0, s100=20.0), better)
    assert found == (factor and pytest.approx(factor))


def test_published_numbers_stand_beside_their_rows():
    rows = {row.name: row for row in tables.load("gamma_schedule").rows}
    table = tables.load("gamma_schedule")
    assert published(table, rows["v1"], "medium")["datacomp"] == "24.87 (0.13)"
    gain = {"datacomp": "+1.46", "retrieval": "+1.80", "imagenet_variants": "+1.96"}
    assert published_gain(table, rows["sogclr"], rows["v1"], "medium") == gain
    scaling = tables.load("scaling")
    base, _, better = scaling.rows[-3:]
    assert published(scaling, base, "large") == {"imagenet_variants": "22.78"}
    assert published_gain(scaling, base, better, "large") == {
        "imagenet_variants_gap": "+2.16",
        "fewer_samples_factor": "1.31",
    }
    temperature = tables.load("temperature")  # without nodes: those of the published setting
    assert published(temperature, temperature.rows[0], "medium") == {"imagenet_variants": "14.73"}
    frozen = next(row for row in temperature.rows if row.name == "clip-frozen")
    assert published(scaling, replace(frozen, nodes=1), "medium") == {}  # nobody has published it


def test_tuning_shows_the_best_of_each_loss_and_what_is_taken(row_of):
    points = [replace(CLIP, name=f"p{lr}", label=f"OpenCLIP: lr {lr}", local={"--lr": lr}) for lr in (1, 2)]
    rows = [row_of(point, 0, recall) for point, recall in zip(points, (10.0, 11.0), strict=True)]
    text = sections.tuning_table([measured(point, rows) for point in points], {rows[0]["key"]})
    assert text.splitlines()[2:] == [
        "| OpenCLIP: lr 1 | 10.0 | 0.050 | 1 | yes |",
        "| OpenCLIP: lr 2 | **11.0** | 0.050 | 1 |  |",
    ]


def test_gain_over_the_best_openclip_row_of_the_same_place(row_of):
    losses = (CLIP, FROZEN, V1, V3)
    rows = [row_of(row, 0, recall) for row, recall in zip(losses, (10.0, 12.0, 15.0, 11.0), strict=True)]
    found = gains_over_openclip([measured(row, rows) for row in losses])
    assert [(m.row.loss, figure.mean) for m, figure in found] == [("fastclip-v1", 3.0), ("fastclip-v3", -1.0)]
    assert gains_over_openclip([measured(row, rows[1:]) for row in losses])[0][1].mean == 3.0  # OpenCLIP was not run
    assert gains_over_openclip([measured(V3, rows)]) == []


@pytest.mark.parametrize(
    ("name", "scale", "lines"),
    [
        ("map", "tiny", {"fastclip-v1, gamma 1 (no memory)": "--", "fastclip-v1": "-", "fastclip-v3": "-"}),
        ("real_batch", "real", {"fastclip-v1": "-", "fastclip-v3": "-", "fastclip-v1, gamma 1 (no memory)": "--"}),
    ],
)
def test_gains_are_drawn_over_the_share_of_wrong_captions_and_over_the_batch(
    name, scale, lines, row_of, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or True)
    table = tables.load(name)
    # places of the x axis: every loss gains 2 points at the first and one more at each that follows
    wanted = {"map": [0.0, 15.0, 30.0, 50.0], "real_batch": [32, 128, 512]}[name]

    def recall(row):
        place = row.batch if name == "real_batch" else 100 * row.data.mismatched
        return 10.0 + (row.loss != "clip") * (2 + wanted.index(place))

    rows = [row_of(row, 0, recall(row)) for row in table.rows]
    plots.draw(name, table, [measured(row, rows, scale) for row in table.rows], scale, tmp_path)
    (axes,) = drawn[0].axes
    assert axes.get_title().startswith("Gain in R@1 over the best OpenCLIP row: 4,500 ")
    shown = {bars.get_label(): bars[0] for bars in axes.containers}
    assert {label: line.get_linestyle() for label, line in shown.items()} == lines  # v3's other rho has one point
    assert list(shown["fastclip-v3"].get_xdata()) == wanted
    assert list(shown["fastclip-v3"].get_ydata()) == [2.0 + i for i in range(len(wanted))]
    assert shown["fastclip-v3"].get_color() == plots.COLOURS["fastclip-v3"]

"""The plots of the report: score over samples seen, gains over batch and wrong captions, and the parts of a step."""

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

from .measured import DATA_NAMES, Figure, Measured, gain, gains_over_openclip, pairs, series
from .table import LOCAL, NOISY, Row, Table, of_scale

COLOURS = {
    "clip": "#8c8c8c", "clip-frozen": "#222222", "siglip": "#8c564b", "sogclr": "#9467bd", "isogclr": "#e377c2",
    "fastclip-v0": "#2ca02c", "fastclip-v1": "#1f77b4", "fastclip-v2": "#ff7f0e", "fastclip-v3": "#d62728",
}  # fmt: skip
FROZEN = "clip-frozen"
PART_COLOURS = {  # of a step, none of them a loss's
    "forward": "#9ecae1", "loss": "#fdae6b", "backward": "#3182bd", "optimizer": "#a1d99b", "data": "#d9d9d9",
    "waiting": "#bcbddc", "others": "#969696", "computation": "#3182bd", "pure communication": "#bcbddc",
}  # fmt: skip
OUTSIDE_THE_BAR = ("total", "communication", "overlapped", "collectives")  # sums, and what runs beside the parts
METRICS = {"tiny": "R@1", "real": "R@1", "larger": "imagenet-variants"}
GAIN_WORDS = dict.fromkeys(LOCAL, "R@1") | {"larger": "the mean of ImageNet & variants"}
CURVE_TITLES = dict.fromkeys(LOCAL, "R@1") | {"larger": "ImageNet zero-shot top 1"}
CURVE_LABELS = dict.fromkeys(LOCAL, "R@1 on held-out pairs, both ways (%)") | {"larger": "top 1 (%)"}
WITH_CURVES = ("laion400m", "real", "real_epochs", "real_gpu")  # tables
Line = list[tuple[float, Figure, Row]]  # place on the x axis, gain with its standard error, row


def colour(row: Row) -> str:
    """The colour of a row's loss."""
    return COLOURS[FROZEN if "--freeze-temperature" in row.flags else row.loss]


def _data(m: Measured) -> str:
    """What the finished runs of a row were trained on, for a title."""
    if m.scale not in LOCAL:
        return DATA_NAMES[m.scale]
    return f"{m.done[0]['train_pairs']:,} {'glyph' if m.scale == 'tiny' else 'real'} pairs"


def _wrong(m: Measured) -> str:
    return f", {m.row.data.mismatched:.0%} wrong captions" if m.scale == "tiny" else ""


def draw_curves(measured: list[Measured], scale: str, path: Path, floor: float | None = None) -> bool:
    """Score over samples seen, a band of one deviation over the seeds. False, and no file, without curves.

    floor: the R@1 of attribute_floor, drawn as a line.
    """
    shown = [(m, m.curve()) for m in measured if m.curve()]
    if not shown:
        return False
    first, _ = shown[0]
    unit, word = (1e3, "thousands") if scale in LOCAL else (1e6, "millions")
    title = (
        f"{of_scale(CURVE_TITLES, scale)}: {_data(first)}{_wrong(first)}, batch {first.done[0]['settings']['batch']}"
    )
    figure, axes = _axes(title, f"samples seen ({word})", of_scale(CURVE_LABELS, scale))
    for m, curve in shown:
        samples = [n / unit for n in curve]
        axes.plot(samples, [f.mean for f in curve.values()], color=colour(m.row), marker="o", label=series(m.row))
        low, high = ([f.mean + sign * f.std for f in curve.values()] for sign in (-1, 1))
        axes.fill_between(samples, low, high, color=colour(m.row), alpha=0.15, linewidth=0)
    if floor is not None:
        axes.axhline(floor, color="#999999", linestyle=":", label="attributes without the character")
    axes.set_xlim(left=0)
    axes.legend()
    return _save(figure, path)


def draw_gaps(table: Table, measured: list[Measured], scale: str, path: Path) -> bool:
    """The gains of a table's comparisons over the global batch, with their standard errors."""
    lines: dict[str, Line] = {}
    for _, base, better in pairs(table, measured):
        if found := gain(better, base, of_scale(METRICS, scale)):
            place = base.row.batch if scale in LOCAL else base.row.nodes
            name = f"{series(better.row)} over {series(base.row)}"
            lines.setdefault(name, []).append((place, found, better.row))
    title = next((f"{_data(m)}{_wrong(m)}" for m in measured if m.done), "")
    x_label = "global batch" if scale in LOCAL else "nodes"
    return _draw_gains(lines, f"Gain in {of_scale(GAIN_WORDS, scale)}: {title}", x_label, path, is_doubling=True)


def draw_gains_over_openclip(measured: list[Measured], path: Path, over_batch: bool) -> bool:
    """Each loss's gain over the best OpenCLIP row at the same batch, or at the same share of wrong captions.

    Lines of one point are left out, and so are rows whose data differ from the usual ones in more than that share.
    """
    if not over_batch:
        measured = [
            m for m in measured if replace(m.row.data, mismatched=NOISY.mismatched) == NOISY and m.row.batch == 32
        ]
    places = [m.row.batch if over_batch else 100 * m.row.data.mismatched for m in measured]
    lines: dict[str, Line] = {}
    for place in sorted(set(places)):
        group = [m for m, of in zip(measured, places, strict=True) if of == place]
        for m, found in gains_over_openclip(group):
            lines.setdefault(series(m.row), []).append((place, found, m.row))
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    title = next(
        (f"{_data(m)}, {f'{m.row.epochs} epochs' if over_batch else 'batch 32'}" for m in measured if m.done), ""
    )
    x_label = "batch" if over_batch else "wrong captions (%)"
    return _draw_gains(lines, f"Gain in R@1 over the best OpenCLIP row: {title}", x_label, path, is_doubling=over_batch)


def _draw_gains(lines, title, x_label, path, is_doubling):
    if not lines:
        return False
    figure, axes = _axes(title, x_label, "gain (points)")
    for name, points in lines.items():
        places, gains, (row, *_) = zip(*points, strict=True)
        heights, errors = [gain.mean for gain in gains], [gain.std for gain in gains]
        style = "--" if "--fastclip-gamma" in row.flags else "-"  # without the memory of u
        axes.errorbar(places, heights, errors, color=colour(row), marker="o", linestyle=style, capsize=3, label=name)
    axes.axhline(0, color="#222222", linewidth=1)
    ticks = sorted({place for points in lines.values() for place, *_ in points})
    if is_doubling:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{place:g}" for place in ticks])
    axes.legend()
    return _save(figure, path)


def draw_step_times(measured: list[Measured], path: Path) -> bool:
    """Bars of a step's parts that follow one another."""
    shown = [(m, m.step_time()) for m in measured if m.step_time()]
    if not shown:
        return False
    first = shown[0][0]
    where = "32 pairs a rank, on the CPU" if first.scale in LOCAL else "the recipe's batch a GPU"
    figure, axes = _axes(f"Parts of a training step: {_data(first)}, {where}", "ms a step", "")
    left = [0.0] * len(shown)
    for part in (name for name in shown[0][1] if name not in OUTSIDE_THE_BAR):
        widths, name = [times[part] for _, times in shown], part.replace("_", " ")
        axes.barh([m.row.label for m, _ in shown], widths, left=left, label=name, color=PART_COLOURS[name])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=7, columnspacing=1.2, handlelength=1.2)
    return _save(figure, path)


def _axes(title, x_label, y_label):
    plt.rcParams.update({"legend.frameon": False, "legend.fontsize": 9, "axes.titlesize": 11})
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure, path):
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def draw(name: str, table: Table, measured: list[Measured], scale: str, folder: Path) -> str | None:
    """Draws the plot of a table at a scale; returns the Markdown that shows it, None if there is nothing to draw."""
    path = folder / f"{name}-{scale}.png"
    if name in WITH_CURVES:
        caption, is_drawn = "Score over samples seen", draw_curves(measured, scale, path)
    elif name == "scaling":
        caption, is_drawn = "Gain over the batch", draw_gaps(table, measured, scale, path)
    elif name in ("real_batch", "map"):
        caption = f"Gain over the {'batch' if name == 'real_batch' else 'share of wrong captions'}"
        is_drawn = draw_gains_over_openclip(measured, path, over_batch=name == "real_batch")
    elif name == "step_time":
        caption, is_drawn = "Parts of a step", draw_step_times(measured, path)
    else:
        return None
    return f"![{caption}]({path.name})" if is_drawn else None

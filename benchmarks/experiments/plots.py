"""The plots of the report: score over samples seen, gap over the batch, step times, and the map of regimes."""

from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

from .measured import Figure, Measured, gain, pairs
from .table import LOCAL, NOISY, Row, Table, of_scale

COLOURS = {
    "clip": "#8c8c8c", "clip-frozen": "#222222", "siglip": "#8c564b", "sogclr": "#9467bd", "isogclr": "#e377c2",
    "fastclip-v0": "#2ca02c", "fastclip-v1": "#1f77b4", "fastclip-v2": "#ff7f0e", "fastclip-v3": "#d62728",
}  # fmt: skip
FROZEN = "clip-frozen"
R1_LABEL = "R@1 on held-out pairs, mean of both ways (%)"
Y_LABELS = {"tiny": R1_LABEL, "real": R1_LABEL, "larger": "ImageNet zero-shot top 1 (%)"}
OUTSIDE_THE_BAR = ("total", "communication", "overlapped", "collectives")  # sums, and what runs beside the parts
LINE_STYLES = ("-", "--", ":", "-.")  # of lines of one colour
METRICS = {"tiny": "R@1", "real": "R@1", "larger": "imagenet-variants"}


def colour(row: Row) -> str:
    """The colour of a row's loss."""
    return COLOURS[FROZEN if "--freeze-temperature" in row.flags else row.loss]


def draw_curves(measured: list[Measured], scale: str, path: Path, floor: float | None = None) -> bool:
    """Score over samples seen, a band of one deviation over the seeds. False, and no file, without curves.

    floor: the R@1 of attribute_floor, drawn as a line.
    """
    shown = [(m, m.curve()) for m in measured if m.curve()]
    unit, word = (1e3, "thousands") if scale in LOCAL else (1e6, "millions")
    figure, axes = _axes(f"samples seen ({word})", of_scale(Y_LABELS, scale))
    for m, curve in shown:
        samples = [n / unit for n in curve]
        axes.plot(samples, [f.mean for f in curve.values()], color=colour(m.row), marker="o", label=m.row.label)
        low, high = ([f.mean + sign * f.std for f in curve.values()] for sign in (-1, 1))
        axes.fill_between(samples, low, high, color=colour(m.row), alpha=0.15, linewidth=0)
    if floor is not None:
        axes.axhline(floor, color="#999999", linestyle=":", label="attributes without the character")
    return _save(figure, axes, path, bool(shown))


def draw_gaps(table: Table, measured: list[Measured], scale: str, path: Path) -> bool:
    """The gains of a table's comparisons over the global batch, with their standard errors.

    A line for each pair of rows whose labels differ from others in what follows ", batch" alone.
    """
    lines: dict[str, list[tuple[int, Figure, str]]] = {}
    for _, base, better in pairs(table, measured):
        if found := gain(better, base, of_scale(METRICS, scale)):
            name = " over ".join(m.row.label.split(", batch")[0] for m in (better, base))
            place = base.row.batch if scale in LOCAL else base.row.nodes
            lines.setdefault(name, []).append((place, found, colour(better.row)))
    figure, axes = _axes("global batch" if scale in LOCAL else "nodes", "gain (points)")
    drawn: Counter[str] = Counter()
    for name, points in lines.items():
        places, gains, (shade, *_) = zip(*points, strict=True)
        heights, errors = [gain.mean for gain in gains], [gain.std for gain in gains]
        style = LINE_STYLES[drawn[shade]]
        axes.errorbar(places, heights, errors, color=shade, marker="o", linestyle=style, capsize=3, label=name)
        drawn[shade] += 1
    axes.axhline(0, color="#999999", linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({place for points in lines.values() for place, *_ in points})
    axes.set_xticks(ticks, [str(place) for place in ticks])
    return _save(figure, axes, path, bool(lines))


def draw_step_times(measured: list[Measured], path: Path) -> bool:
    """Bars of a step's parts that follow one another."""
    shown = [(m, m.step_time()) for m in measured if m.step_time()]
    figure, axes = _axes("ms a step", "")
    parts = [name for name in (shown[0][1] if shown else ()) if name not in OUTSIDE_THE_BAR]
    left = [0.0] * len(shown)
    for part in parts:
        widths = [times[part] for _, times in shown]
        axes.barh([m.row.label for m, _ in shown], widths, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    return _save(figure, axes, path, bool(shown), loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)


def draw_shares(measured: list[Measured], path: Path) -> bool:
    """R@1 over the share of wrong captions, a line a loss: the first regimes of the map."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for m in measured:
        data = m.row.data
        plain = data == NOISY or data.train_per_character == 30 and not data.partial and not data.long_tail
        if plain and m.row.batch == 32 and m.done:
            label = m.row.label.split(": ", 1)[1]
            lines.setdefault((label, colour(m.row)), []).append((100 * data.mismatched, m.metric("R@1").mean))
    figure, axes = _axes("wrong captions (%)", R1_LABEL)
    drawn = set()
    for (label, shade), points in lines.items():
        style = "--" if shade in drawn else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, color=shade, marker="o", label=label)
        drawn.add(shade)
    return _save(figure, axes, path, bool(lines))


def _axes(x_label, y_label):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure, axes, path, is_drawn, **legend):
    if is_drawn:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, **legend)
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return is_drawn


def draw(name: str, table: Table, measured: list[Measured], scale: str, folder: Path) -> str | None:
    """Draws the plot of a table at a scale; returns the Markdown that shows it, None if there is nothing to draw."""
    path = folder / f"{name}-{scale}.png"
    caption, drawing = {
        **dict.fromkeys(("laion400m", "real"), ("Score over samples seen", lambda: draw_curves(measured, scale, path))),
        **dict.fromkeys(
            ("scaling", "real_batch"), ("Gap over the batch", lambda: draw_gaps(table, measured, scale, path))
        ),
        "step_time": ("Parts of a step", lambda: draw_step_times(measured, path)),
        "map": ("R@1 over the share of wrong captions", lambda: draw_shares(measured, path)),
    }.get(name, ("", lambda: False))
    return f"![{caption}]({path.name})" if drawing() else None

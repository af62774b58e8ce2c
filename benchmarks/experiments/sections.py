"""Every table as a section of the report, in Markdown."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from . import local, plots
from .measured import DATA_NAMES, IMAGENET, Measured, fewer_samples, gain, pairs, published, published_gain, series
from .store import key_of
from .table import LOCAL, Table, of_scale

RECALL_COLUMNS = {
    "image_to_text_R@1": "image→text R@1",
    "image_to_text_R@5": "R@5",
    "text_to_image_R@1": "text→image R@1",
    "text_to_image_R@5": "R@5",
}
U_COLUMNS = {"log_u_mean": "final log u", "log_u_std": "its deviation", "u_lag": "final u_lag"}
COLUMNS = {
    "tiny": {
        "R@1": "R@1, mean",
        **RECALL_COLUMNS,
        "top1": "zero-shot top 1",
        "top5": "top 5",
        "tau": "final tau",
        **U_COLUMNS,
    },
    "real": {
        "R@1": "R@1, mean",
        "R@1 new": "R@1 new, mean",
        "R@10": "R@10, mean",
        "top1": "zero-shot top 1",
        "probe": "linear probe",
        "tau": "final tau",
        **U_COLUMNS,
    },
    "larger": {
        "imagenet-variants": "ImageNet & variants",
        "retrieval": "retrieval",
        "datacomp": "DataComp",
        IMAGENET: "ImageNet top 1",
        "tau": "final tau",
    },
}
GAINS = {  # the columns whose gains are shown
    "tiny": ("R@1", "top1", "top5"),
    "real": ("R@1", "R@1 new", "top1", "probe"),
    "larger": ("imagenet-variants", "retrieval", "datacomp"),
}
HEADLINES = {  # the published column that stands for a table where nothing was run, the first of these that it has
    "imagenet_variants_gap": "ImageNet & variants",
    "imagenet_variants": "ImageNet & variants",
    "imagenet_top1": "ImageNet top 1",
    "total": "ms a step",
}
DIGITS = {"tau": 3, "samples_per_second": 0}  # after the point; of the others one


def markdown(header: list[str], rows: list[list[str]], aligned: bool = False) -> str:
    """A Markdown table; `aligned` to be read as text, with the cells of a column equally wide."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width or 3) for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def cell(figure, digits: int = 1, sign: bool = False) -> str:
    """mean (std), or the mean alone of a single seed; empty for None."""
    if figure is None:
        return ""
    text = f"{figure.mean:{'+' if sign else ''},.{digits}f}"
    return f"{text} ({figure.std:.{digits}f})" if figure.count > 1 else text


def figures(measured: Measured, columns: Iterable[str]) -> list[str]:
    """A row's cells in the columns of these metrics."""
    return [cell(measured.metric(name), DIGITS.get(name, 1)) for name in columns]


def status(measured: Measured) -> str:
    """Number of finished seeds, and what failed."""
    if measured.failed:
        counts = Counter(run["error"] for run in measured.failed)
        errors = "; ".join(f"{count} failed: {error}" for error, count in counts.items())
        return f"{len(measured.done)}, {errors}"
    return str(len(measured.done)) if measured.done else "not run"


def _words(column):
    return column.replace("_", " ")


def _published_header(columns):
    return [f"published {_words(column)}" for column in columns]


def results_table(table: Table, measured: list[Measured], scale: str) -> str:
    """The rows of a table: measured beside published. Columns without a figure are left out."""
    names = of_scale(COLUMNS, scale)
    columns = {name: of for name, of in names.items() if any(m.metric(name) for m in measured)}
    beside = [published(table, m.row, _setting(scale)) for m in measured]
    extra = list(dict.fromkeys(column for cells in beside for column in cells))
    rows = []
    for m, cells in zip(measured, beside, strict=True):
        rows.append([_label(m, scale), *figures(m, columns), status(m), *(cells.get(column, "") for column in extra)])
    return markdown(["", *columns.values(), "seeds", *_published_header(extra)], rows)


def comparison_table(table: Table, measured: list[Measured], scale: str) -> str | None:
    """The gains that a table is about, with their standard errors, beside the published ones; None without any."""
    names, columns = of_scale(GAINS, scale), of_scale(COLUMNS, scale)
    compared = pairs(table, measured)
    beside = [published_gain(table, base.row, better.row, _setting(scale)) for _, base, better in compared]
    extra = list(dict.fromkeys(column for cells in beside for column in cells))
    rows = []
    for (_, base, better), cells in zip(compared, beside, strict=True):
        gaps = [cell(gain(better, base, name), sign=True) for name in names]
        factor = fewer_samples(base.curve(), better.curve())
        if any(gaps) or cells:
            rows.append([f"{better.row.label} over {base.row.label}", *gaps, f"{factor:.2f}" if factor else ""])
            rows[-1] += [cells.get(column, "") for column in extra]
    header = ["gain (standard error)", *(columns[name] for name in names), "fewer samples, times"]
    return markdown([*header, *_published_header(extra)], rows) if rows else None


def _setting(scale):
    return "medium" if scale == "tiny" else scale


def _label(m: Measured, scale: str) -> str:
    row = m.row
    usual = scale != "tiny" or (row.batch, row.ranks) == (32, 1)
    return row.label if usual else f"{row.label} ({row.batch} pairs, {row.ranks} rank{'s' * (row.ranks > 1)})"


def tuning_table(measured: list[Measured], used: set[str]) -> str:
    """One line a point of the grid; the best of each loss in bold, and which one the other tables take."""
    groups: dict[str, list[Measured]] = {}
    for m in measured:
        groups.setdefault(m.row.label.split(":")[0], []).append(m)
    rows = []
    for group in groups.values():
        scores = {m.row.name: m.metric("tuning").mean for m in group if m.done}
        for m in group:
            score = f"{scores[m.row.name]:.1f}" if m.done else ""
            if m.done and scores[m.row.name] == max(scores.values()):
                score = f"**{score}**"
            taken = key_of(local.settings_of(m.row, 0)) in used
            rows.append([m.row.label, score, cell(m.metric("tau"), 3), status(m), "yes" if taken else ""])
    return markdown(["", "R@1 on the tuning pairs", "final tau", "seeds", "taken"], rows)


def step_time_table(table: Table, measured: list[Measured], scale: str) -> str:
    """Milliseconds of a step by part; published ones only where the measured ones are of GPUs too."""
    beside = [{} if scale == "tiny" else published(table, m.row, scale) for m in measured]
    extra = list(dict.fromkeys(column for cells in beside for column in cells))
    parts = list(dict.fromkeys(part for m in measured for part in m.step_time()))
    rows = [
        [_label(m, scale), *(f"{m.step_time()[part]:.1f}" if m.done else "" for part in parts), status(m)]
        + [cells.get(column, "") for column in extra]
        for m, cells in zip(measured, beside, strict=True)
    ]
    return markdown(["ms a step", *(_words(part) for part in parts), "runs", *_published_header(extra)], rows)


def heading(table: Table, scale: str) -> str:
    """The heading of a table's section: its title, but at the first of its scales with the data's name."""
    return table.title if scale == table.scales[0] else f"{table.title}, {DATA_NAMES[scale]}"


def command(name: str, scale: str, quick: bool = False) -> str:
    """What runs what is missing of a table at a scale."""
    return f"`python -m benchmarks.run {name} --scale {scale}{' --quick' if quick else ''}`"


def section(
    name: str, table: Table, scale: str, measured: list[Measured], used: set[str], folder: Path, quick: bool
) -> str:
    """All that is known of the table of that name at a scale, its plot drawn in `folder`.

    used: keys of the settings that other tables have. Rows that were not run are left out at the local scales; at the
    larger ones they have published numbers beside them.
    """
    run = [m for m in measured if m.done or m.failed]
    shown = run if scale in LOCAL else measured
    parts = [f"### {heading(table, scale)}", table.question]
    if run and table.kind == "tuning":
        parts.append(tuning_table(shown, used))
    elif run and table.kind == "step_time":
        parts.append(step_time_table(table, shown, scale))
    elif run:
        parts += [results_table(table, shown, scale), comparison_table(table, shown, scale)]
    missing = len(measured) - len(run)
    if missing:
        rows, them = ("row", "it") if missing == 1 else ("rows", "them")
        parts.append(f"{missing} {rows} not run yet: {command(name, scale, quick)} makes {them}.")
    if run:
        parts += [plots.draw(name, table, shown, scale, folder), table.notes if scale == table.scales[0] else None]
    return "\n\n".join(filter(None, parts))


def cluster_line(name: str, table: Table, scale: str, measured: list[Measured]) -> list[str]:
    """The cells of a table at a larger scale where nothing was run: what runs it, what its outcome is compared with."""
    found = [
        (
            f"{_short(better.row)} over {_short(base.row)}",
            better.row,
            published_gain(table, base.row, better.row, scale),
        )
        for _, base, better in pairs(table, measured)
    ]
    if not any(cells for *_, cells in found):
        found = [(_short(m.row), m.row, published(table, m.row, scale)) for m in measured]
    if table.kind == "step_time":
        found = [line for line in found if line[1].loss in ("clip", "fastclip-v3")]
    column = next((column for column in HEADLINES if any(column in cells for *_, cells in found)), None)
    values: dict[str, list[str]] = {}
    nodes: list[int] = []
    for label, row, cells in found:
        if column in cells:
            values.setdefault(label, []).append(cells[column].split(" (")[0])
            nodes += [row.nodes] if row.nodes and row.nodes not in nodes else []
    where = f" at {_slashes(nodes)} nodes" if nodes else ""
    texts = ", ".join(f"{label} {_slashes(of)}" for label, of in values.items())
    compared = f"{HEADLINES[column]}{where}: {texts}" if column else ""
    return [table.title, f"{scale} ({DATA_NAMES[scale]})", command(name, scale), compared]


def _short(row):
    """Its algorithm, by which what is published of it is found."""
    return series(row).split(" (")[0]


def _slashes(values):
    return " / ".join(map(str, values))

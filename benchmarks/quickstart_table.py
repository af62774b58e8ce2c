"""The quickstart's table (Markdown, JSON) and its curves of validation recall over epochs."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

from .experiments.run_log import final_temperature, read_log, read_results, samples_per_second

HEADER = (
    "loss", "batch", "image→text R@1", "R@5", "text→image R@1", "R@5", "final tau", "samples/s", "minutes",
)  # fmt: skip
RECALLS = ("image_to_text_R@1", "image_to_text_R@5", "text_to_image_R@1", "text_to_image_R@5")
LABELS = {"clip": "OpenCLIP", "clip-frozen": "OpenCLIP, temperature frozen"}  # other losses go by their own name
COLOURS = {
    "clip": "#8c8c8c", "clip-frozen": "#222222", "sogclr": "#9467bd", "isogclr": "#e377c2", "fastclip-v0": "#2ca02c",
    "fastclip-v1": "#1f77b4", "fastclip-v2": "#ff7f0e", "fastclip-v3": "#d62728",
}  # fmt: skip


def write_table(runs: list, info: dict, folder: Path) -> str:
    """Writes table.md, table.json and curves.png of `runs` to `folder`; returns the text of table.md.

    `info` is the data's dataset.json. Recall is in percent; a failed run is named with its last line.
    """
    rows = [_row(run) for run in runs]
    text = "\n\n".join([_heading(runs, info), _markdown(rows), _footer(rows, info)]) + "\n"
    (folder / "table.md").write_text(text)
    facts = {key: info[key] for key in ("settings", "train_pairs", "mismatched_pairs", "val_pairs", "floor", "sha256")}
    (folder / "table.json").write_text(json.dumps({"data": facts, "rows": rows}, indent=1) + "\n")
    _draw_curves(runs, info, folder / "curves.png")
    return text


def _row(run) -> dict:
    row = {"loss": LABELS.get(run.name, run.name), "command": " ".join(["python", *run.command])}
    if run.error:
        return {**row, "failed": run.error}
    log, result = read_log(run.folder), read_results(run.folder)[-1]
    recalls = {key: round(100 * result[key], 2) for key in RECALLS}
    return {
        **row,
        "batch": run.batch,
        **recalls,
        "tau": round(final_temperature(log), 4),
        "samples_per_second": round(samples_per_second(log)),
        "minutes": run.record["minutes"],
    }


def _heading(runs, info) -> str:
    share = f"{100 * info['mismatched_pairs'] / info['train_pairs']:g}%"
    wrong = f"{share} of their captions are wrong" if info["mismatched_pairs"] else "all of their captions are right"
    return (
        f"**Glyph data: {info['train_pairs']:,} training pairs, {wrong}; "
        f"recall (%) on {info['val_pairs']:,} held-out pairs, all right** "
        f"({runs[0].epochs} epochs, one seed, one CPU thread a run)"
    )


def _markdown(rows) -> str:
    lines = [list(HEADER), ["-"] * len(HEADER)]
    for row in rows:
        if "failed" in row:
            lines.append([row["loss"], "failed", *[""] * (len(HEADER) - 2)])
            continue
        recalls = [f"{row[key]:.1f}" for key in RECALLS]
        speed = [f"{row['tau']:.3f}", f"{row['samples_per_second']:,}", f"{row['minutes']:.1f}"]
        lines.append([row["loss"], str(row["batch"]), *recalls, *speed])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _footer(rows, info) -> str:
    floor = info["floor"]
    failures = [f"{row['loss']} failed: {row['failed']}\n" for row in rows if "failed" in row]
    return "".join(failures) + (
        "Knowing size, colours, frame and background but not the character would give "
        f"R@1 {floor['R@1']:.1f} and R@5 {floor['R@5']:.1f}, both ways."
    )


def _draw_curves(runs, info, path):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for run in runs:
        results = read_results(run.folder)
        mean = [50 * (result["image_to_text_R@1"] + result["text_to_image_R@1"]) for result in results]
        epochs = [result["epoch"] for result in results]
        label = LABELS.get(run.name, run.name) + (" (failed)" if run.error else "")
        axes.plot(epochs, mean, color=COLOURS[run.name], marker="o", markersize=3, label=label)
    axes.axhline(info["floor"]["R@1"], color="#999999", linestyle=":", label="attributes without the character")
    axes.set_xlabel("epochs")
    axes.set_ylabel("R@1 on held-out pairs, mean of both ways (%)")
    axes.set_title(f"Glyph data, {100 * info['mismatched_pairs'] / info['train_pairs']:g}% wrong captions", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)

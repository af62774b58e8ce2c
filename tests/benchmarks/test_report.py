"""python -m benchmarks.report on stored rows of every table."""

from benchmarks import report, tables
from benchmarks.experiments import glyph_scores
from benchmarks.experiments.store import Store


def test_all_tables_render_from_stored_rows(row_of, tmp_path):
    store = Store(tmp_path)
    for name in tables.NAMES:
        for row in tables.load(name).rows_at("tiny"):
            points = [{"samples": n, **dict.fromkeys(glyph_scores.RECALLS, n / 3000)} for n in (27000, 54000)]
            changes = {"curve": points} if row.curve else {}
            changes |= {"step_time": {"total": 9.5, "loss": 1.5, "others": 8.0}} if "--profile" in row.flags else {}
            store.add(row_of(row, 0, 18.0, **changes))
    report.main(["--results", str(tmp_path)])
    text = (tmp_path / "REPORT.md").read_text()
    assert text.count("\n## ") == len(tables.NAMES) and "14.3 and R@5 68.1" in text
    assert "| fastclip-v3, x2 (64 pairs, 2 ranks) | 9.5 | 1.5 | 8.0 | 1 |" in text
    for name in ("laion400m", "scaling", "step_time", "map"):
        assert f"({name}-tiny.png)" in text and (tmp_path / f"{name}-tiny.png").stat().st_size > 1000
    assert "1.00 |" in text  # two equal curves: no fewer samples

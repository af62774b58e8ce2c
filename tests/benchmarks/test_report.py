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


def test_scale_real_is_reported_with_its_own_scores_and_nothing_published(row_of, tmp_path):
    store = Store(tmp_path)
    names = [name for name in tables.NAMES if "real" in tables.load(name).scales]
    for name in names:
        for row in tables.load(name).rows:
            points = [{"samples": n, **dict.fromkeys(glyph_scores.RECALLS, n / 5000)} for n in (60516, 121032)]
            for seed, recall in zip(range(row.seeds), (8.0, 10.0, 12.0), strict=False):
                recall += 3 * (row.loss == "fastclip-v3") + seed * (row.loss == "clip")
                store.add(row_of(row, seed, recall, **({"curve": points} if row.curve else {})))
    report.main(["--results", str(tmp_path)])
    text = (tmp_path / "REPORT.md").read_text()
    assert "R@1 new is\nover 1,000 pairs whose captions" in text
    section = text.split("## Real pairs\n")[1].split("\n## ")[0]
    assert "published" not in section and "![Score over samples seen](real-real.png)" in section
    assert section.split("\n| --- ")[0].splitlines()[-1] == (
        "|  | R@1, mean | R@1 new, mean | R@10, mean | zero-shot top 1 | linear probe | final tau | seeds |"
    )
    assert "| OpenCLIP | 11.0 (3.0) | 12.0 (3.0) | 11.0 (3.0) | 1.1 (0.3) | 22.0 (6.0) | 0.050 (0.000) | 3 |" in section
    gain = "| fastclip-v3 over OpenCLIP | +2.0 (0.6) | +2.0 (0.6) | +0.2 (0.1) | +4.0 (1.2) | 1.00 |"
    assert gain in section  # gains of 3, 2 and 1 points, with their standard error
    tuning = text.split("## Tuning on real pairs\n")[1].split("\n## ")[0]
    assert "| OpenCLIP: lr 0.0005, temperature 0.07 | **8.0** | 0.050 | 1 | yes |" in tuning
    assert "![Gap over the batch](real_batch-real.png)" in text
    for name in ("real", "real_batch"):
        assert (tmp_path / f"{name}-real.png").stat().st_size > 1000
    assert "fastclip-v3, batch 512 over OpenCLIP, batch 512" in text and "not run" not in text.split("Scale real: ")[-1]

"""python -m benchmarks.report on stored rows of every table."""

import re
from dataclasses import replace

import pytest

from benchmarks import report, tables
from benchmarks.experiments import glyph_scores
from benchmarks.experiments.cluster import Job
from benchmarks.experiments.store import FAILED, Store
from benchmarks.experiments.table import LARGER
from benchmarks.tables.settings import CLIP, FROZEN, V1, V3


def at_scale(scale):
    return [name for name in tables.NAMES if scale in tables.load(name).scales]


def rendered(folder):
    """The report's parts: what is before the first, then real pairs, glyphs and the cluster's."""
    report.main(["--results", str(folder)])
    return re.split(r"^## Part \d: .*\n", (folder / "REPORT.md").read_text(), flags=re.MULTILINE)


def section_of(part, title):
    return part.split(f"\n### {title}\n")[1].split("\n### ")[0]


@pytest.fixture
def tiny_runs(row_of, tmp_path):
    """A folder with all runs of scale tiny."""
    store = Store(tmp_path)
    for name in tables.NAMES:
        for row in tables.load(name).rows_at("tiny"):
            points = [{"samples": n, **dict.fromkeys(glyph_scores.RECALLS, n / 3000)} for n in (27000, 54000)]
            changes = {"curve": points} if row.curve else {}
            changes |= {"step_time": {"total": 9.5, "loss": 1.5, "others": 8.0}} if "--profile" in row.flags else {}
            store.add(row_of(row, 0, 18.0, **changes))
    return tmp_path


def test_all_tables_render_from_stored_rows(tiny_runs):
    head, real, glyphs, _ = rendered(tiny_runs)
    assert glyphs.count("\n### ") == len(at_scale("tiny")) and real.count("\n### ") == len(at_scale("real"))
    assert "14.3 and\nR@5 68.1" in glyphs and "not run" not in glyphs
    assert "| fastclip-v3, x2 (64 pairs, 2 ranks) | 9.5 | 1.5 | 8.0 | 1 |" in glyphs
    for name in ("laion400m", "scaling", "step_time", "map"):
        assert f"({name}-tiny.png)" in glyphs and (tiny_runs / f"{name}-tiny.png").stat().st_size > 1000
    assert "1.00 |" in glyphs  # two equal curves: no fewer samples
    assert "| 3.97 |" not in glyphs and "| +3.97 | 1.46 |" in glyphs  # published, beside ours


def test_the_contents_lead_to_every_heading(tiny_runs):
    head, *parts = rendered(tiny_runs)
    links = re.findall(r"\[(.+?)\]\(#(.+?)\)", head)
    headings = re.findall(r"^##+ (.+)", (tiny_runs / "REPORT.md").read_text(), re.MULTILINE)
    assert [title for title, _ in links] == [title for title in headings if title != "Contents"]
    assert len({anchor for _, anchor in links}) == len(links)  # a table of two scales has two headings
    assert links[1] == ("Real pairs", "real-pairs") and links[-2][0] == "Tuning of the optimizers"
    assert ("Real pairs on a GPU", "real-pairs-on-a-gpu") in links
    assert ("Part 3: ready for a cluster", "part-3-ready-for-a-cluster") in links


def test_a_table_for_the_cluster_is_a_line_until_something_of_it_was_run(tiny_runs, row_of):
    *_, cluster = rendered(tiny_runs)
    lines = [line for line in cluster.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == sum(len(at_scale(scale)) for scale in LARGER) and "###" not in cluster
    scaling = "| Scaling | medium (CC3M) | `python -m benchmarks.run scaling --scale medium` "
    gaps = "ImageNet & variants at 1 / 2 / 4 / 8 nodes: fastclip-v3 over OpenCLIP +4.21 / +4.35 / +3.97 / +3.17 |"
    assert f"{scaling}| {gaps}" in lines
    assert any("medium` | ImageNet & variants: OpenCLIP 14.73, fastclip-v1 18.86, " in line for line in lines)
    assert any("ImageNet top 1: fastclip-v3 over OpenCLIP +1.58 at 42 epochs; +2.64 at 30" in line for line in lines)

    job = Job(replace(CLIP, nodes=2), "medium", 0)
    Store(tiny_runs).add(row_of(CLIP, 0, 18.0, key=job.key, scale="medium", settings=job.settings))
    *_, cluster = rendered(tiny_runs)
    assert scaling not in cluster and cluster.index("### Scaling, CC3M") < cluster.index("| table | scale |")
    assert "| OpenCLIP, batch x2 | 0.050 | 1 | 14.73 |" in cluster
    assert "| fastclip-v3, batch x2 |  | not run | 19.09 |" in cluster
    assert "7 rows not run yet: `python -m benchmarks.run scaling --scale medium` makes them." in cluster


def test_rows_that_were_not_run_are_counted_and_those_that_failed_are_shown(row_of, tmp_path):
    store = Store(tmp_path)
    store.add(row_of(CLIP, 0, 18.0))
    store.add(row_of(V3, 0, 0.0) | {"status": FAILED, "error": "out of memory"})
    _, real, glyphs, _ = rendered(tmp_path)
    table = section_of(glyphs, "Temperature")
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][2:] == [
        "| OpenCLIP",
        "| fastclip-v3",
    ]
    assert "0, 1 failed: out of memory" in table
    assert "gain (standard error)" not in section_of(glyphs, "LAION400M")  # of OpenCLIP and the row that failed
    assert "\n4 rows not run yet: `python -m benchmarks.run temperature --scale tiny` makes them.\n" in table
    question = tables.load("real_epochs").question
    nothing_run = (
        f"\n{question}\n\n4 rows not run yet: `python -m benchmarks.run real_epochs --scale real` makes them.\n"
    )
    assert section_of(real, "Longer training on real pairs") == nothing_run
    for row in (FROZEN, V1):
        store.add(row_of(row, 0, 18.0))
    memory = section_of(rendered(tmp_path)[2], "Memory and temperature")
    assert "| OpenCLIP, temperature frozen over OpenCLIP | +0.0 |" in memory
    assert " over fastclip-v3, gamma 1" not in memory  # of which one was not run


def test_scale_real_is_reported_with_its_own_scores_and_nothing_published(row_of, tmp_path):
    store = Store(tmp_path)
    for name in at_scale("real"):
        for row in tables.load(name).rows:
            points = [{"samples": n, **dict.fromkeys(glyph_scores.RECALLS, n / 5000)} for n in (60516, 121032)]
            for seed, recall in zip(range(row.seeds), (8.0, 10.0, 12.0), strict=False):
                recall += 3 * (row.loss == "fastclip-v3") + seed * (row.loss == "clip")
                store.add(row_of(row, seed, recall, **({"curve": points} if row.curve else {})))
    _, real, _, _ = rendered(tmp_path)
    assert "R@1\nnew is over 1,000 pairs whose captions" in real and "not run" not in real
    section = section_of(real, "Real pairs")
    assert "published" not in section and "![Score over samples seen](real-real.png)" in section
    assert section.split("\n| --- ")[0].splitlines()[-1] == (
        "|  | R@1, mean | R@1 new, mean | R@10, mean | zero-shot top 1 | linear probe | final tau | seeds |"
    )
    assert "| OpenCLIP | 11.0 (3.0) | 12.0 (3.0) | 11.0 (3.0) | 1.1 (0.3) | 22.0 (6.0) | 0.050 (0.000) | 3 |" in section
    gain = "| fastclip-v3 over OpenCLIP | +2.0 (0.6) | +2.0 (0.6) | +0.2 (0.1) | +4.0 (1.2) | 1.00 |"
    assert gain in section  # gains of 3, 2 and 1 points, with their standard error
    tuning = section_of(real, "Tuning on real pairs")
    assert "| OpenCLIP: lr 0.0005, temperature 0.07 | **8.0** | 0.050 | 1 | yes |" in tuning
    assert "![Gain over the batch](real_batch-real.png)" in real
    for name in ("real", "real_batch", "real_epochs", "real_gpu"):
        assert (tmp_path / f"{name}-real.png").stat().st_size > 1000
    assert "fastclip-v3, batch 512 over OpenCLIP, batch 512" in real

"""What the measurements share: rows that are kept, processes, memory, and the accounting of a ring."""

import json

import pytest
import torch

import open_clip_train_fastclip
from benchmarks.harness import network, records
from benchmarks.harness.memory import peak_extra_bytes
from benchmarks.harness.one_rank import Case
from benchmarks.harness.processes import in_processes


def test_rows_are_appended_and_never_replaced(tmp_path, capsys):
    for value in (1, 2):
        records.finish("loss_cost", ["8x32x16"], [{"value": value}], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "loss_cost.jsonl").read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2]
    assert rows[0]["command"] == "python -m benchmarks.loss_cost 8x32x16"
    assert capsys.readouterr().out.splitlines() == ['{"rows": [{"value": 1}]}', '{"rows": [{"value": 2}]}']


def test_a_package_that_is_on_the_path_alone_has_no_version(monkeypatch):
    monkeypatch.setattr(records, "PACKAGES", ("torch", "not-installed"))
    found = records.circumstances("benchmarks.x", [])["versions"]
    assert found["torch"] and found["not-installed"] is None
    assert found["open-clip-train-fastclip"] == open_clip_train_fastclip.__version__


def test_ratios_are_taken_round_by_round():
    assert records.ratio_quartiles([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_failing_process_is_reported(count):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_processes(count, divmod, 1, 0)


def allocate(megabytes):
    torch.zeros(1)
    return peak_extra_bytes(lambda: torch.ones(megabytes * 2**18).sum(), "cpu")


def test_peak_memory_is_that_of_the_function():
    (extra,) = in_processes(1, allocate, 64)
    assert 64e6 < extra < 75e6


@pytest.mark.parametrize("text", ["8x30", "8x30x16", "0x8x8", "1x1x8", "axbxc"])
def test_a_case_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError):
        Case.parse(text)


def test_ring_accounting():
    gather = network.Collective("features", 1, given=100, got=400)
    scatter = network.Collective("reduce-scatter", 1, given=400, got=100)
    total = network.Collective("table rows", 1, given=400, got=400)
    assert [c.type for c in (gather, scatter, total)] == ["all-gather", "reduce-scatter", "all-reduce"]
    assert [c.wire_bytes(4) for c in (gather, scatter, total)] == [300, 300, 600]
    assert [c.wire_bytes(4, gpus=8) for c in (gather, scatter, total)] == [700, 700, 1400]

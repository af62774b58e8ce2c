"""The parts of the check of a GPU find what is wrong: each is shown something broken."""

import math

import pytest
import torch

from benchmarks.gpu import accuracy, curves, groups, host_waits, linear_towers, stored
from benchmarks.gpu.measurement import Settings, relative, relative_norm, row
from benchmarks.harness.training_steps import KeptBatches, ReadySamples
from open_clip_train_fastclip.loss import functional
from open_clip_train_fastclip.loss.nonfinite import NonfiniteGuard

CPU = Settings("cpu", small=True)


def break_float32(monkeypatch, name, factor):
    """One function of the arithmetic gives something else, but for float64."""
    right = getattr(functional, name)

    def wrong(*args):
        result = right(*args)
        return result * factor if result.dtype == torch.float32 else result

    monkeypatch.setattr(functional, name, wrong)


@pytest.mark.parametrize("name, found", [("updated_log_u", "log_u_image"), ("pair_weights", "gradient")])
def test_accuracy_finds_wrong_arithmetic(name, found, monkeypatch):
    assert accuracy.against_float64("fastclip-v3", "float32", "exact", 32, 16, "cpu")["ok"]
    break_float32(monkeypatch, name, 1.001)
    broken = accuracy.against_float64("fastclip-v3", "float32", "exact", 32, 16, "cpu")
    assert not broken["ok"] and found in broken["figures"]["too_large"]


@pytest.mark.parametrize("products, tolerated", [("exact", 0), ("tf32-gradient", 6e-4), ("tf32", 2e-3)])
def test_gradients_are_judged_by_their_arithmetic(products, tolerated):
    for error, expected in ((0.9 * tolerated, True), (1.1 * tolerated + 1e-4, False)):
        errors = {"gradient": error, "gradient_norm": error, "value": 1e-6}
        assert (not accuracy.beyond_tolerance(errors, 3e-5, products)) == expected
    assert bool(accuracy.beyond_tolerance({"value": 1e-4}, 3e-5, products)) == (products != "tf32")


def test_accuracy_finds_a_step_that_moves_with_a_nan(monkeypatch):
    assert accuracy.steps_with_nan("cpu")["ok"]
    monkeypatch.setattr(NonfiniteGuard, "_is_bad", lambda self: torch.tensor(False))
    assert not accuracy.steps_with_nan("cpu")["ok"]


def test_a_nan_is_never_near_anything():
    nan = torch.tensor([1.0, math.nan])
    assert relative(nan, torch.ones(2)) == relative_norm(nan, torch.ones(2)) == math.inf
    assert relative(torch.tensor([math.inf, 1]), torch.tensor([1, math.inf])) == math.inf
    assert relative(torch.tensor([-math.inf, 2]), torch.tensor([-math.inf, 1])) == 1


def test_groups_find_a_sum_that_is_none(monkeypatch):
    assert all(found["ok"] for found in groups.rows(CPU))
    monkeypatch.setattr(groups.ThroughTheHost, "start_sum", lambda self, local: lambda: local)
    wrong = {found["case"]["group"] for found in groups.rows(CPU) if not found["ok"]}
    assert wrong == {"two ranks through the host"}


def test_a_curve_must_fall_and_be_finite():
    assert curves.of_curve({}, [3.0, 2.0, 1.0])["ok"]
    assert not curves.of_curve({}, [1.0, 2.0, 3.0])["ok"]
    assert not curves.of_curve({}, [3.0, 2.0, math.nan])["ok"]


def test_the_small_problem_is_the_same_every_time():
    first, second, other = (
        linear_towers.train(linear_towers.make_loss(name, 8, torch.float64, "cpu"), 8, torch.float64, "cpu")
        for name in ("fastclip-v3", "fastclip-v3", "fastclip-v2")
    )
    assert groups.difference(first, second) == 0
    assert groups.difference(first, other) > 1e-3


def test_host_waits_are_counted_by_line():
    *_, v3, _ = list(host_waits.rows(CPU))
    assert v3["case"]["loss"] == "fastclip-v3"
    guards = {n for line, n in v3["figures"]["waits"].items() if "loss/nonfinite.py" in line}
    assert guards == {host_waits.STEPS}


def stored_row(card, figures, ok=True, device="cpu"):
    machine = {"cpu": card, "gpu": None} if device == "cpu" else {"cpu": "A", "gpu": card}
    return row("step", {"model": "x"}, figures, ok) | {"part": "some", "device": device, "machine": machine}


def test_rows_are_compared_with_the_last_of_the_same_card():
    now = stored_row("A", {"step_ms": 12.0})
    earlier = [stored_row("A", {"step_ms": ms}) for ms in (20.0, 10.0)] + [stored_row("B", {"step_ms": 1.0})]
    assert list(stored.changes(now, earlier)) == ["step_ms was 10 and is 12 (+20%)"]
    assert list(stored.changes(now, [stored_row("A", {"step_ms": 11.5})])) == []
    assert list(stored.changes(now, [now | {"case": {"model": "y"}, "ok": False}])) == []
    assert list(stored.changes(now | {"ok": False}, [now])) == ["ok was True and is False"]
    assert list(stored.changes(now | {"ok": None}, [now])) == []
    assert list(stored.changes(now, [stored_row("G", {"step_ms": 1.0}, device="cuda")])) == []


def test_curves_are_compared_with_those_of_every_card():
    now = stored_row("A", {"curve": [3.0, 2.0, 1.0]})
    earlier = [stored_row("A", {"curve": [3.0, 2.0, 1.5]}), stored_row("B", {"curve": [3.0, 2.25, 1.0]}, device="cuda")]
    assert list(stored.changes(now, earlier)) == [
        "off the curve of A by at most 0.5",
        "off the curve of B by at most 0.25",
    ]


def test_kept_batches_are_the_first_ones_again_and_again():
    data = ReadySamples(image_size=2, dataset_size=12, tokenizer=lambda texts: torch.arange(len(texts)))
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    loader.num_batches = len(loader)
    assert [texts.tolist() for _, texts in KeptBatches(loader, "cpu")] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [0, 1],
        [2, 3],
    ]

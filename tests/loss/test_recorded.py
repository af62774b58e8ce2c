"""What a GPU records: that replayed parts give what plain ones give, and when they are replayed.

There is no GPU here: in place of a CUDA graph a recording runs the function again and copies its results over those of
the first time, so what is overwritten and what is not is as it is there.
"""

import copy

import numpy as np
import pytest
import torch
from drive import make_loss, run_steps, state_of
from torch import Tensor
from trajectories import LOSSES, golden_settings, random_steps

from open_clip_train_fastclip.loss import functional, fused, recorded
from open_clip_train_fastclip.loss.recorded import Recorded


@pytest.fixture
def replays(monkeypatch):
    """The functions that were replayed, in order, on a CPU that records."""
    names = []

    def capture(function, arguments):
        result = function(*arguments)
        overwrite(result, lambda old, _: old.copy_(torch.full_like(old, 7)), arguments)  # a capture computes nothing

        def replay():
            names.append(function.__name__)
            overwrite(result, lambda old, new: old.copy_(new), arguments, function(*arguments))

        return result, replay

    monkeypatch.setattr(fused, "_works", False)  # nothing is compiled here
    monkeypatch.setattr(recorded, "_capture", capture)
    monkeypatch.setattr(recorded, "_pays", lambda first: not torch.is_inference_mode_enabled())
    return names


def overwrite(old, change, arguments, new=None):
    """Call change(old tensor, new tensor) for what a function returned, unless it shares an argument's memory."""
    of_arguments = {x.untyped_storage().data_ptr() for x in tensors(arguments)}
    fresh = list(tensors(old if new is None else new))
    for a, b in zip(tensors(old), fresh, strict=True):
        if a.untyped_storage().data_ptr() not in of_arguments:
            change(a, b)


def tensors(value):
    """All tensors in tuples, lists and objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__"):
        yield from tensors(list(vars(value).values()))


def steps():
    ids = [range(8), [1, 9, 9, 3, 12, 13, 1, 5], range(4, 12), [5, 5, 5, 6, 7, 8, 9, 2], range(8), range(8, 16)]
    return random_steps(ids, epochs=[0, 0, 0, 1, 1, 2], aligned=0.5)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Copies are always looked for: to know that there are none a host would wait."""
    monkeypatch.setattr(functional, "are_distinct", lambda ids: False)


def plain(monkeypatch):
    monkeypatch.setattr(recorded, "_pays", lambda first: False)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_replayed_steps_are_plain_steps(loss, replays, as_on_a_gpu, monkeypatch):
    settings = golden_settings(loss)
    found = run_steps(settings, steps(), announce=True)
    assert set(replays) == {"_look_up", "_compare", "_conclude"} and replays.count("_conclude") == 4
    plain(monkeypatch)
    assert_equal(found, run_steps(settings, steps(), announce=True))


def eventful(loss_name):
    """Steps of two calls each, disturbed by evaluations and by bad features, some undone; what each leaves behind."""
    loss, records = make_loss(golden_settings(loss_name)), []
    for number, (image, text, ids, epoch) in enumerate(steps()):
        if epoch != loss.epoch:
            loss.start_epoch(epoch)
        image, text, ids = torch.tensor(image), torch.tensor(text), torch.tensor(ids)
        loss.begin_step(ids)
        for call in range(2):
            with torch.no_grad():
                aside = loss(text[:5], image[:5], torch.arange(20, 25)).item()
            i, t = (f.roll(call, 0).clone().requires_grad_() for f in (image, text))
            if number == 3:
                i.data[2, 1] = torch.nan
            value = loss(i, t)
            value.backward()
            records.append({"value": value.item(), "aside": aside, "image": i.grad.numpy(), "text": t.grad.numpy()})
        if number == 4:
            loss.undo_step()
        if number == 5:
            loss.undo_step(torch.tensor(False))
            records.append(state_of(loss) | loss.metrics())
            loss.undo_step()
        records.append(state_of(loss) | loss.metrics() | {"usable": loss.usable.item()})
    return [{name: np.array(value) for name, value in record.items()} for record in records]


@pytest.mark.parametrize("loss", LOSSES)
def test_replayed_steps_can_be_undone_interrupted_and_have_several_calls(loss, replays, as_on_a_gpu, monkeypatch):
    found = eventful(loss)
    assert {"_compare_again", "_gradients"} <= set(replays) and "u_lag" in found[-1]
    plain(monkeypatch)
    for ours, expected in zip(found, eventful(loss), strict=True):
        assert ours.keys() == expected.keys()
        assert all(np.array_equal(ours[name], expected[name], equal_nan=True) for name in expected)


def double(x):
    return x * 2, x


def test_a_call_is_recorded_when_it_comes_again(replays):
    record = Recorded(double)
    results = [record(torch.full((2,), float(n))) for n in range(4)]
    assert replays == ["double"] * 3 and results[1] is results[2] is results[3]
    assert results[3][0].tolist() == [6, 6] and results[3][1].tolist() == [3, 3]
    assert record(torch.ones(3))[0].tolist() == [2, 2, 2] and len(replays) == 3, "another shape runs as it is"
    assert record(torch.ones(2))[0].tolist() == [2, 2] and len(replays) == 4


def test_calls_that_differ_are_not_recorded(replays):
    record = Recorded(double)
    for n in (2, 3, 2, 3):
        assert record(torch.ones(n))[0].tolist() == [2] * n
    assert not replays


def test_where_no_graph_can_be_made_the_function_runs_with_one_warning(monkeypatch, recwarn):
    def refuse(function, arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(recorded, "_works", True)
    monkeypatch.setattr(recorded, "_pays", lambda first: recorded._works)
    monkeypatch.setattr(recorded, "_capture", refuse)
    record = Recorded(double)
    assert [record(torch.ones(1))[0].item() for _ in range(4)] == [2] * 4
    (warning,) = recwarn
    assert "operation not permitted" in str(warning.message) and "\n" not in str(warning.message)


def test_a_copy_of_the_loss_records_its_own(replays, as_on_a_gpu):
    loss = make_loss(golden_settings("fastclip-v3"))
    run_steps(golden_settings("fastclip-v3"), steps(), announce=True, loss=loss)
    twin = copy.deepcopy(loss)
    before = state_of(loss)
    run_steps(golden_settings("fastclip-v3"), steps(), announce=True, loss=twin)
    assert_equal(state_of(loss), before)


def test_what_the_caller_gives_stays_as_it_is(replays, as_on_a_gpu):
    """Slices of one tensor of ids: the recording reads a copy."""
    loss, ids = make_loss(golden_settings("fastclip-v3")), torch.arange(64)
    for _ in range(2):
        for part in ids.split(16):
            loss.begin_step(part)
            loss(*torch.nn.functional.normalize(torch.randn(2, 16, 8, dtype=torch.float64), dim=2).requires_grad_())
    assert "_conclude" in replays and torch.equal(ids, torch.arange(64)) and loss.visited == 64


def test_a_temperature_that_is_kept_stays_as_it_was(replays, as_on_a_gpu):
    loss, kept = make_loss(golden_settings("fastclip-v2")), []
    for image, text, ids, epoch in steps():
        loss.start_epoch(epoch)
        loss(torch.tensor(image, requires_grad=True), torch.tensor(text), torch.tensor(ids))
        kept.append((loss.temperature, loss.temperature.item()))
    assert all(tensor.item() == value for tensor, value in kept)

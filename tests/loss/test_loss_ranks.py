"""FastCLIPLoss on several ranks: the same run whatever their number, the same result on all, a table that is split."""

from functools import cache

import numpy as np
import pytest
import torch
from drive import (
    assert_equals_reference,
    global_gradient,
    make_loss,
    on_ranks,
    rank_and_world_size,
    rank_slice,
    run_steps,
    state_of,
    train,
)
from ranks import run_ranks
from reference import GLOBAL_TAU, INDIVIDUAL_TAU
from trajectories import LOSSES, assert_close, golden_settings, random_steps

from open_clip_train_fastclip.checkpoint.table import load_state, save_state

BATCH = 12  # divisible by 1, 2, 3 and 4 ranks
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


@cache
def trained(world_size):
    """{(loss, precision): [result of train on each rank]} for three epochs."""
    cases = [(loss, precision) for loss in LOSSES for precision in TOLERANCE]
    per_rank = on_ranks(world_size, lambda: [train(golden_settings(loss), BATCH, p) for loss, p in cases])
    return {case: [of_rank[k] for of_rank in per_rank] for k, case in enumerate(cases)}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_run_of_one(world_size, loss, precision):
    (one,), several = trained(1)[loss, precision], trained(world_size)[loss, precision]
    for name in ("grad_image", "grad_text"):
        assert_close(global_gradient(several, name), one[name], TOLERANCE[precision], name)
    for rank, result in enumerate(several):
        assert result.keys() == one.keys()
        for name in one.keys() - {"grad_image", "grad_text"}:
            u_or_moment = name.startswith(("log_u", "tau_m", "tau_v"))
            loose = u_or_moment and precision == "float32" and loss in INDIVIDUAL_TAU
            tolerance = 2e-4 if loose else TOLERANCE[precision]
            for step in (0, -1):  # after one step and after three epochs
                assert_close(result[name][step], one[name][step], tolerance, f"{name} of step {step} on rank {rank}")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_goes_on_over_four_two_three_and_one_ranks(loss, tmp_path):
    """Saved after every epoch and resumed on another number of ranks, it is the run of one rank that never stopped."""
    settings, world_sizes = golden_settings(loss), (4, 2, 3, 1)
    epochs = [epoch for epoch in range(len(world_sizes)) for _ in range(2)]
    rng = np.random.default_rng(0)
    steps = random_steps([rng.permutation(settings["num_samples"])[:BATCH] for _ in epochs], epochs, aligned=0.8)

    def run_epoch(epoch):
        fastclip = make_loss(settings)
        if epoch > 0:
            load_state(fastclip, tmp_path / str(epoch - 1))
        result = run_steps(settings, steps[2 * epoch : 2 * epoch + 2], loss=fastclip)
        save_state(fastclip, tmp_path / str(epoch), epoch + 1)
        return result

    expected = run_steps(settings, steps)
    for epoch, world_size in enumerate(world_sizes):
        results, of_epoch = on_ranks(world_size, run_epoch, epoch), slice(2 * epoch, 2 * epoch + 2)
        for name in ("grad_image", "grad_text"):
            assert_close(global_gradient(results, name), expected[name][of_epoch], 1e-10, name)
        for name in expected.keys() - {"grad_image", "grad_text"}:
            for result in results:
                assert_close(result[name], expected[name][of_epoch], 1e-10, f"{name} in epoch {epoch}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_returns_the_same_value_and_state(world_size, loss):
    first, *others = trained(world_size)[loss, "float32"]
    for other in others:
        for name in first.keys() - {"grad_image", "grad_text"}:
            assert np.array_equal(first[name], other[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pair_on_each_of_two_ranks_is_a_batch_of_two(loss):
    settings, steps = golden_settings(loss), random_steps([[4, 9], [9, 60]], epochs=[0, 1], aligned=0.3)
    assert_equals_reference(settings, steps, run_ranks(2, run_steps, settings, steps), 1e-10)


def test_a_group_of_one_rank_is_a_single_process():
    settings, steps = golden_settings("fastclip-v3"), random_steps([range(8)], epochs=[0], aligned=0.3)
    assert_equals_reference(settings, steps, run_ranks(1, run_steps, settings, steps), 1e-10)


def test_bfloat16_features_cross_the_network_as_they_are():
    def one_step():
        loss = make_loss(golden_settings("fastclip-v3"), "float32")
        ((image, text, ids, _),) = random_steps([range(12)], epochs=[0], aligned=0.3)
        mine = rank_slice(12)
        e_1, e_2 = (torch.tensor(f[mine], dtype=torch.bfloat16, requires_grad=True) for f in (image, text))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(e_1, e_2, torch.tensor(ids[mine]))
        value.backward()
        gradients = {"image": e_1.grad.double().numpy()[None], "text": e_2.grad.double().numpy()[None]}
        return gradients | state_of(loss) | {"value": value.item()}

    (one,), two = on_ranks(1, one_step), run_ranks(2, one_step)
    for name in ("image", "text"):
        assert_close(global_gradient(two, name), one[name], 5e-3, f"{name} gradient, rounded to bfloat16")
    for name in one.keys() - {"image", "text"}:
        assert_close(two[1][name], one[name], 2e-5, name)


def test_announcing_the_ids_changes_nothing():
    steps = random_steps([range(12), range(6, 18)], epochs=[0, 1], aligned=0.3)

    def both_ways():
        return [[run_steps(golden_settings(loss), steps, announce=a) for a in (False, True)] for loss in LOSSES]

    for world_size in (1, 2):
        for of_rank in on_ranks(world_size, both_ways):
            for loss, (silent, announced) in zip(LOSSES, of_rank, strict=True):
                for name in silent:
                    assert np.array_equal(silent[name], announced[name]), f"{loss}, {world_size} ranks: {name}"


@pytest.mark.parametrize("loss,columns", [("fastclip-v3", 2), ("fastclip-v2", 8)])
def test_each_of_four_ranks_holds_a_quarter_of_the_table(loss, columns):
    num_samples = 4003

    def measure():
        table = make_loss(golden_settings(loss, num_samples=num_samples), "float32").table
        return table.start, table.stop, table.rows.untyped_storage().nbytes()

    spans = run_ranks(4, measure)
    assert [start for start, _, _ in spans] == [0] + [stop for _, stop, _ in spans[:-1]]
    assert spans[-1][1] == num_samples
    for _, _, held in spans:
        assert held <= (num_samples / 4 + 2) * columns * 4  # bytes of float32; one spare row


def test_the_gathered_table_holds_every_sample_in_order():
    settings = golden_settings("fastclip-v1", num_samples=10)  # not divisible by 4

    def marked():
        loss = make_loss(settings)
        loss.table.local("log_u_image").copy_(torch.arange(loss.table.start, loss.table.stop))
        return state_of(loss)["log_u_image"]

    for gathered in run_ranks(4, marked):
        assert np.array_equal(gathered, np.arange(10))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_non_finite_feature_leaves_the_state_of_every_rank_alone(world_size, bad):
    steps = random_steps([range(12)] * 3, epochs=[0, 1, 1], aligned=0.3)

    def with_and_without_a_bad_step():
        outcome = []
        for loss in LOSSES:
            fields = golden_settings(loss)
            if loss == "fastclip-v0":  # its cosine counts steps, so a step more would move it on
                fields["tau_lr_schedule"] = "const"
            broken, clean = make_loss(fields), make_loss(fields)
            for a_step in steps:
                before = state_of(broken)
                _apply(broken, a_step, bad)
                outcome.append((f"{loss}: the bad step moved", before, state_of(broken)))
                _apply(broken, a_step)
                _apply(clean, a_step)
                outcome.append((f"{loss}: later steps differ in", state_of(clean), state_of(broken)))
        return outcome

    for of_rank in on_ranks(world_size, with_and_without_a_bad_step):
        for what, expected, actual in of_rank:
            for name in expected:
                assert np.array_equal(expected[name], actual[name]), f"{what} {name}"


def _apply(loss, a_step, bad=None):
    """One step; with `bad`, one feature of the last rank is that number."""
    image, text, ids, epoch = a_step
    loss.start_epoch(epoch)
    mine = rank_slice(len(ids))
    image, text = torch.tensor(image[mine], requires_grad=True), torch.tensor(text[mine])
    rank, world_size = rank_and_world_size()
    if bad is not None and rank == world_size - 1:
        text[1, 2] = bad
    loss(image, text.requires_grad_(), torch.tensor(ids[mine])).backward()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_accumulated_parts_equal_one_batch(loss, world_size):
    """A calls a step, each with all A parts' features of which one carries gradient, as OpenCLIP does it."""
    parts, settings = 3, golden_settings(loss)
    steps = random_steps([range(24), range(12, 36), range(24)], epochs=[0, 1, 1], aligned=0.3)

    def both_ways():
        return run_steps(settings, steps), accumulate(settings, steps, parts)

    for whole, accumulated in on_ranks(world_size, both_ways):
        for part in range(parts):
            assert_close(accumulated["value"][:, part], whole["value"], 1e-12, f"value of part {part}")
            for name in accumulated["states"][part]:
                of_part = accumulated["states"][part][name]
                assert_close(of_part, whole[name], 1e-12, f"{name} after part {part}: it moves in the first call only")
        assert_close(accumulated["grad_image"], whole["grad_image"], 1e-12, "image gradient")
        assert_close(accumulated["grad_text"], whole["grad_text"], 1e-12, "text gradient")


def accumulate(settings, steps, parts):
    """run_steps with every step in `parts` calls: value [steps, parts], gradients, and the states after each call."""
    loss, values, gradients, states = make_loss(settings), [], {"image": [], "text": []}, [[] for _ in range(parts)]
    for t, (image, text, ids, epoch) in enumerate(steps):
        loss.start_epoch(epoch)
        mine = rank_slice(len(ids))
        features = {"image": torch.tensor(image[mine]), "text": torch.tensor(text[mine])}
        loss.begin_step(torch.tensor(ids[mine]))
        values.append([])
        of_step = {"image": [], "text": []}
        for part in range(parts):
            chunks = {side: list(f.chunk(parts)) for side, f in features.items()}
            for side in chunks:
                chunks[side][part] = chunks[side][part].clone().requires_grad_()
            value = loss(torch.cat(chunks["image"]), torch.cat(chunks["text"]))
            value.backward()
            values[-1].append(value.item())
            states[part].append(state_of(loss))
            for side in chunks:
                of_step[side].append(chunks[side][part].grad.numpy())
        assert loss.step == t + 1, "one step, however many parts"
        for side in of_step:
            gradients[side].append(np.concatenate(of_step[side]))
    stacked = [{name: np.stack([s[name] for s in of_part]) for name in of_part[0]} for of_part in states]
    return {
        "value": np.array(values),
        "grad_image": np.stack(gradients["image"]),
        "grad_text": np.stack(gradients["text"]),
        "states": stacked,
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_without_its_later_parts_is_dropped_at_the_epochs_end(loss):
    """The next epoch begins with the same ids, so it would look like a later part of the step that was dropped."""
    complete, dropped = make_loss(golden_settings(loss)), make_loss(golden_settings(loss))
    first, second = random_steps([range(24), range(24)], epochs=[0, 1], aligned=0.3)
    _apply(complete, first)
    image, text, ids, _ = first
    dropped.begin_step(torch.tensor(ids))
    dropped(torch.tensor(image, requires_grad=True), torch.tensor(text, requires_grad=True)).backward()
    for either in (complete, dropped):
        _apply(either, second)
    expected, actual = state_of(complete), state_of(dropped)
    for name in expected:
        assert np.array_equal(expected[name], actual[name]), name


def test_the_global_tau_state_survives_a_transfer():
    for loss in GLOBAL_TAU:
        settings = golden_settings(loss)
        donor, heir = make_loss(settings), make_loss(settings)
        for a_step in random_steps([range(12)] * 2, epochs=[0, 1], aligned=0.3):
            _apply(donor, a_step)
        heir.load_tau_state(donor.tau_state())
        assert heir.tau_state() == donor.tau_state()
        assert heir.temperature.item() == donor.temperature.item()

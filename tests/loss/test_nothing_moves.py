"""What must not move the loss: evaluation, copies, wrappers; and what its state_dict says."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from drive import make_loss, on_ranks, rank_and_world_size, rank_slice, run_steps, state_of
from ranks import run_ranks
from torch import nn
from torch.nn.functional import normalize
from trajectories import LOSSES, golden_settings, random_steps

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss, load_state, save_state

BATCH = 8
STEPS = random_steps([range(8), range(4, 12), range(8)], epochs=[0, 0, 1], aligned=0.8)
MODES = {"eval": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def everything(loss):
    """All that a call could move."""
    counts = {name: getattr(loss, name) for name in ("visited", "usable", "skipped_steps", "mean_individual_tau")}
    figures = {f"metric_{name}": value for name, value in loss.metrics().items()}
    return state_of(loss) | {name: value.clone() for name, value in counts.items()} | figures | {"step": loss.step}


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def call(loss, step, mode):
    """The value and gradients of a call in that mode, or of a training call (mode None)."""
    image, text, ids, _ = step
    mine = rank_slice(BATCH)
    image, text = (torch.tensor(f[mine], requires_grad=True) for f in (image, text))
    loss.train(mode != "eval")
    with MODES.get(mode, nullcontext)():
        value = loss(image, text, torch.tensor(np.array(ids)[mine]))
    loss.train()
    if value.requires_grad:
        value.backward()
    return value.item(), image.grad, text.grad


def evaluated(loss_name, mode):
    """Whether nothing moved in such a call, the value it gave, and that of the training call after it."""
    loss = make_loss(golden_settings(loss_name))
    call(loss, STEPS[0], None)
    before = everything(loss)
    value, *gradients = call(loss, STEPS[1], mode)
    still = same(before, everything(loss))
    trained, *expected = call(loss, STEPS[1], None)
    moved = not same(before, everything(loss))
    equal = mode != "eval" or all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    return still, moved, equal, value, trained


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_moves_nothing(world_size):
    """Its value, and in eval mode its gradients, are those that a step would have."""
    cases = [(loss, mode) for loss in LOSSES for mode in MODES]
    for results in on_ranks(world_size, lambda: [evaluated(*case) for case in cases]):
        for case, (still, moved, equal, value, trained) in zip(cases, results, strict=True):
            assert still and moved and equal and value == trained, case


def interrupted(loss_name):
    """run_steps with announced steps, each disturbed by an evaluation of other samples before and within it."""
    loss = make_loss(golden_settings(loss_name))
    values = []
    for image, text, ids, epoch in STEPS:
        if epoch != loss.epoch:
            loss.start_epoch(epoch)
        mine = rank_slice(BATCH)
        loss.begin_step(torch.tensor(np.array(ids)[mine]))
        call(loss, STEPS[2], "no_grad")
        features = [torch.tensor(f[mine], requires_grad=True) for f in (image, text)]
        values.append(loss(*features).item())
        call(loss, STEPS[1], "inference")
        with torch.no_grad():
            loss(*features)  # of the step under way
        values.append(loss(*features).item())  # as with accumulation
    return values, state_of(loss)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_inside_a_step_leaves_the_step_alone(world_size):
    for results in on_ranks(world_size, lambda: [interrupted(loss) for loss in LOSSES]):
        for loss, (values, state) in zip(LOSSES, results, strict=True):
            assert values[::2] == values[1::2]
            undisturbed = on_ranks(world_size, run_steps, golden_settings(loss), STEPS)[0]
            assert values[::2] == list(undisturbed["value"]), loss
            assert all(np.array_equal(value, undisturbed[name][-1]) for name, value in state.items()), loss


def test_bad_features_in_an_evaluation_are_no_bad_step():
    loss = make_loss(golden_settings("fastclip-v3"))
    image, text, ids, _ = STEPS[0]
    with torch.no_grad():
        loss(torch.tensor(image) * torch.nan, torch.tensor(text), torch.tensor(np.array(ids)))
    assert loss.usable and loss.skipped_steps == 0 and loss.visited == 0


@pytest.mark.parametrize("loss_name", LOSSES)
def test_figures_after_a_first_batch_that_is_all_bad(loss_name, recwarn):
    loss = make_loss(golden_settings(loss_name))
    image, text, ids, _ = STEPS[0]
    bad = torch.full(image.shape, torch.nan, dtype=torch.float64)
    loss(bad, torch.tensor(text), torch.tensor(np.array(ids)))
    figures = loss.metrics()
    assert not recwarn.list and np.isfinite(list(figures.values())).all() and figures["skipped_steps"] == 1


# ---- in a module of the user's


class Model(nn.Module):
    """Two towers with the loss beside them, 9 samples: two ranks hold parts of different size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(8, 4), nn.Linear(8, 4)
        self.loss = FastCLIPLoss(FastCLIPConfig(loss="fastclip-v2", num_samples=9))

    def forward(self, images, texts, ids):
        return self.loss(normalize(self.image(images), dim=1), normalize(self.text(texts), dim=1), ids)


def table_after_steps(wrap, world_size=None):
    rank, ranks = rank_and_world_size()
    model = Model()
    wrapped = wrap(model)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        images, texts = torch.randn(2, 8, 8, generator=generator)
        mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        wrapped(images[mine], texts[mine], torch.randperm(9, generator=generator)[:8][mine]).backward()
    return state_of(model.loss)


def test_data_parallel_leaves_every_rank_its_own_part():
    """It gives all ranks the buffers of rank 0, so u and tau must be none."""
    alone = table_after_steps(lambda model: model)
    for state in run_ranks(2, table_after_steps, nn.parallel.DistributedDataParallel):
        for name, column in alone.items():
            np.testing.assert_allclose(state[name], column, rtol=1e-3, atol=1e-6, err_msg=name)


def test_a_copy_goes_on_as_the_original():
    loss = make_loss(golden_settings("fastclip-v2"))
    call(loss, STEPS[0], None)
    twin = copy.deepcopy(loss)
    assert same(everything(loss), everything(twin))
    assert call(twin, STEPS[1], None)[0] == call(loss, STEPS[1], None)[0]
    assert same(everything(loss), everything(twin))


def test_a_cast_of_the_model_leaves_u_and_tau_precise():
    model = Model().to(torch.bfloat16)
    assert model.image.weight.dtype == torch.bfloat16 and model.loss.table.rows.dtype == torch.float32
    assert model.loss.mean_individual_tau.dtype == torch.float64
    assert Model().to("meta").loss.table.rows.is_meta


def test_state_dict_says_where_the_rest_is(tmp_path):
    model = Model()
    with pytest.warns(UserWarning, match=r"save_state\(loss, folder, epoch\)"):
        saved = model.state_dict()
    assert set(saved) == {"image.weight", "image.bias", "text.weight", "text.bias"}
    with pytest.warns(UserWarning, match=r"load_state\(loss, folder\)"):
        model.load_state_dict(saved)
    with pytest.warns(UserWarning):
        assert not model.loss.state_dict()
    save_state(model.loss, tmp_path / "state", 1)
    load_state(model.loss, tmp_path / "state")

"""FastCLIPLoss at its edges: extreme temperatures, low precision, scaling, wrong input, and use without OpenCLIP."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drive import assert_equals_reference, make_loss, run_steps, state_of
from reference import Reference
from torch.nn.functional import normalize
from trajectories import LOSSES, assert_close, golden_settings, random_steps, unit

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.loss import logits


def opposite_pairs(dtype):
    """16 pairs near one axis, every text opposite to its image: exponents of +200 at tau 0.01. As rounded to dtype."""
    rng = np.random.default_rng(0)
    sign = np.where(np.arange(16) % 2 == 0, 1.0, -1.0)[:, None]
    axis = unit(rng.standard_normal((1, 8)))
    image = unit(sign * axis + 0.05 * rng.standard_normal((16, 8)))
    text = unit(-sign * axis + 0.05 * rng.standard_normal((16, 8)))
    return [torch.tensor(f, dtype=dtype).double().numpy() for f in (image, text)]


# Gradients come back in the features' dtype, so low precision rounds each element; values stay float32.
@pytest.mark.parametrize(
    "dtype,gradient_tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_opposite_pairs_at_the_smallest_tau_are_finite_and_right(loss, dtype, gradient_tolerance):
    settings = golden_settings(loss, temperature=0.01)
    image, text = opposite_pairs(dtype)
    ids = np.arange(16)
    fastclip, reference = make_loss(settings, "float32"), Reference(SimpleNamespace(**settings))
    for epoch in (0, 1):
        expected = reference.step(image, text, ids, epoch)
        assert expected.g["image"].max() > np.finfo(np.float32).max, "g must overflow float32, or this tests nothing"
        e_1, e_2 = (torch.tensor(f, dtype=dtype, requires_grad=True) for f in (image, text))
        fastclip.start_epoch(epoch)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            value = fastclip(e_1, e_2, torch.tensor(ids))
        value.backward()
        assert value.dtype == torch.float32
        assert_close(value.item(), expected.value, 2e-5, "value")
        for feature, gradient in ((e_1, expected.grad_image), (e_2, expected.grad_text)):
            assert feature.grad.dtype == dtype
            assert torch.isfinite(feature.grad).all()
            assert_close(feature.grad.double(), gradient, gradient_tolerance, "gradient")
        for side in ("image", "text"):
            assert_close(fastclip.full_state()[f"log_u_{side}"][ids], reference.log_u[side][ids], 2e-5, "log u")
            if loss in ("fastclip-v2", "isogclr"):
                assert_close(fastclip.full_state()[f"tau_{side}"], reference.tau[side], 2e-5, "tau")
        if loss in ("fastclip-v0", "fastclip-v3"):
            assert_close(fastclip.tau_state()["log_inv_tau"], reference.log_inv_tau, 2e-5, "log(1/tau)")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_global_batch_of_copies_of_one_sample_stays_finite(loss):
    """Without any negative g is 0: nothing pushes, and the sample counts as not yet seen."""
    fastclip = make_loss(golden_settings(loss))
    ((image, text, ids, _),) = random_steps([[3, 3, 3]], epochs=[0], aligned=0.3)
    e_1, e_2 = torch.tensor(image, requires_grad=True), torch.tensor(text, requires_grad=True)
    before = fastclip.temperature.item()
    value = fastclip(e_1, e_2, torch.tensor(ids))
    value.backward()
    assert torch.isfinite(value)
    assert torch.all(e_1.grad == 0) and torch.all(e_2.grad == 0)
    assert np.isfinite(fastclip.temperature.item()) and abs(fastclip.temperature.item() / before - 1) < 0.1
    assert all(np.all(np.isfinite(x)) for name, x in state_of(fastclip).items() if not name.startswith("log_u"))


def test_copies_of_one_sample_count_as_unseen_whatever_their_temperatures():
    """On one rank the text logits are the image logits times a ratio of temperatures, the excluded ones too."""
    fastclip = make_loss(golden_settings("fastclip-v2"))
    fastclip.table.rows[:, 2], fastclip.table.rows[:, 3] = 0.01, 1.0
    ((image, text, ids, _),) = random_steps([[3, 3]], epochs=[0], aligned=0.3)
    fastclip(torch.tensor(image), torch.tensor(text), torch.tensor(ids))
    assert all(fastclip.full_state()[f"log_u_{side}"][3] == -np.inf for side in ("image", "text"))


@pytest.mark.parametrize("tile_columns", [1, 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_tiles_and_recomputed_similarities_change_nothing(loss, tile_columns, monkeypatch):
    """A large batch is walked through in tiles, here of few columns: some hold only an anchor's own copies."""
    ids = [5, 5, 5, 5, 5, 5, 6, 7, 8, 9, 10, 5]
    steps, settings = random_steps([ids, range(12)], epochs=[0, 1], aligned=0.8), golden_settings(loss)
    monkeypatch.setitem(logits.KEPT_ELEMENTS, "cpu", 0)
    monkeypatch.setitem(logits.TILE_ELEMENTS, "cpu", tile_columns * len(ids))
    assert_equals_reference(settings, steps, [run_steps(settings, steps)], 1e-10)


def gradients(loss, ids, scale):
    ((image, text, _, _),) = random_steps([ids], epochs=[0], aligned=0.3)
    e_1, e_2 = (torch.tensor(f, dtype=torch.float32, requires_grad=True) for f in (image, text))
    (loss(e_1, e_2, torch.tensor(ids)) * scale).backward()
    return e_1.grad, e_2.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_scaling_the_value_scales_the_gradients_and_not_the_state(loss):
    plain, scaled = (make_loss(golden_settings(loss), "float32") for _ in range(2))
    for one, many in zip(gradients(plain, range(8), 1.0), gradients(scaled, range(8), 65536.0), strict=True):
        assert torch.equal(one * 65536.0, many)
    expected, actual = state_of(plain), state_of(scaled)
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


def test_only_the_side_that_needs_a_gradient_gets_one():
    """A locked image tower has features without gradient."""
    ((image, text, ids, _),) = random_steps([range(8)], epochs=[0], aligned=0.3)
    both, one = (make_loss(golden_settings("fastclip-v3")) for _ in range(2))
    e_1, e_2 = torch.tensor(image, requires_grad=True), torch.tensor(text, requires_grad=True)
    both(e_1, e_2, torch.tensor(ids)).backward()
    expected = e_2.grad.clone()
    e_1, e_2 = torch.tensor(image), torch.tensor(text, requires_grad=True)
    one(e_1, e_2, torch.tensor(ids)).backward()
    assert e_1.grad is None
    assert torch.equal(e_2.grad, expected)


def test_without_gradient_the_value_is_the_same():
    ((image, text, ids, _),) = random_steps([range(8)], epochs=[0], aligned=0.3)
    image, text, ids = torch.tensor(image), torch.tensor(text), torch.tensor(ids)
    with torch.no_grad():
        value = make_loss(golden_settings("fastclip-v3"))(image, text, ids)
    assert value == make_loss(golden_settings("fastclip-v3"))(image.requires_grad_(), text, ids)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_gives_the_optimizer_nothing(loss):
    assert list(make_loss(golden_settings(loss)).parameters()) == []


@pytest.mark.parametrize("schedule,expected", [("cosine", [1.0, 0.6, 0.2, 0.2]), ("constant", [1.0, 0.2, 0.2, 0.2])])
def test_gamma_follows_the_epoch(schedule, expected):
    loss = make_loss(golden_settings("fastclip-v1", gamma_schedule=schedule))
    for epoch, gamma in enumerate(expected):
        loss.start_epoch(epoch)
        assert loss.gamma == pytest.approx(gamma)


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_tell_the_last_step(loss):
    fastclip = make_loss(golden_settings(loss))
    for image, text, ids, epoch in random_steps([range(12), [2, 20, 20, 21, 3, 4]], epochs=[0, 1], aligned=0.3):
        fastclip.start_epoch(epoch)
        fastclip(torch.tensor(image), torch.tensor(text), torch.tensor(ids))
    figures, table = fastclip.metrics(), fastclip.full_state()
    log_u = torch.stack([table["log_u_image"], table["log_u_text"]])[:, ids]
    assert figures["visited"] == 14 / 64
    assert figures["gamma"] == pytest.approx(fastclip.gamma)
    assert figures["tau"] == pytest.approx(fastclip.temperature.item())
    assert figures["log_u_mean"] == pytest.approx(log_u.mean().item())
    assert figures["log_u_std"] == pytest.approx(log_u.std().item())
    if loss in ("fastclip-v2", "isogclr"):
        tau = torch.stack([table["tau_image"], table["tau_text"]])[:, ids]
        assert figures["tau_std"] == pytest.approx(tau.std().item())


def rows(count):
    return torch.nn.functional.normalize(torch.randn(count, 8), dim=1)


def test_a_global_batch_of_one_pair_is_refused():
    with pytest.raises(UserError, match="(?i)batch"):
        make_loss(golden_settings("fastclip-v1"), "float32")(rows(1), rows(1), torch.tensor([0]))


@pytest.mark.parametrize("bad", [64, -1])
def test_an_id_outside_the_table_is_refused(bad):
    with pytest.raises(UserError, match=str(bad)):
        make_loss(golden_settings("fastclip-v1"), "float32")(rows(2), rows(2), torch.tensor([0, bad]))


def test_a_call_without_ids_is_refused():
    with pytest.raises(UserError, match="ids"):
        make_loss(golden_settings("fastclip-v1"), "float32")(rows(2), rows(2))


def test_more_features_than_ids_are_refused():
    with pytest.raises(UserError, match="ids"):
        make_loss(golden_settings("fastclip-v1"), "float32")(rows(3), rows(3), torch.tensor([0, 1]))


def test_the_loss_needs_no_open_clip():
    program = (
        "import sys\n"
        "sys.modules['open_clip'] = sys.modules['open_clip_train'] = None  # importing them is now an ImportError\n"
        "from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss\n"
        "FastCLIPLoss(FastCLIPConfig(loss='fastclip-v3', num_samples=8))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_complete_loop_learns(loss):
    """The library in a training loop of one's own: two linear towers learn to match 64 pairs."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 16)  # what image and text have in common
    images, texts = hidden @ torch.randn(16, 32), hidden @ torch.randn(16, 24)
    image_tower, text_tower = torch.nn.Linear(32, 16), torch.nn.Linear(24, 16)
    epochs, batch = 20, 16
    config = FastCLIPConfig(loss=loss, num_samples=64, epochs=epochs, gamma=0.5, rho=2.0, lr=1e-2)
    fastclip = FastCLIPLoss(config)
    optimizer = torch.optim.AdamW([*image_tower.parameters(), *text_tower.parameters()], lr=1e-2)
    for epoch in range(epochs):
        fastclip.start_epoch(epoch)
        for ids in torch.randperm(64).split(batch):
            fastclip.begin_step(ids)
            value = fastclip(normalize(image_tower(images[ids]), dim=1), normalize(text_tower(texts[ids]), dim=1))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert torch.isfinite(value)
    similarity = normalize(image_tower(images), dim=1) @ normalize(text_tower(texts), dim=1).T
    matched = (similarity.argmax(dim=1) == torch.arange(64)).float().mean()
    assert matched > 0.9
    assert torch.isfinite(fastclip.full_state()["log_u_image"]).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("features, table", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_features_and_table_may_be_of_different_precision(loss, features, table):
    """In every call of a step, with the value of a loss whose table has the features' precision."""
    ((image, text, ids, _),) = random_steps([range(8)], epochs=[0], aligned=0.3)
    values = []
    for table_dtype in (table, features):
        fastclip = FastCLIPLoss(FastCLIPConfig(**golden_settings(loss), table_dtype=table_dtype))
        fastclip.begin_step(torch.tensor(ids))
        for _ in range(2):
            leaves = [torch.tensor(f, dtype=features, requires_grad=True) for f in (image, text)]
            value = fastclip(*leaves)
            value.backward()
        values.append([value.item(), *(leaf.grad.double().numpy() for leaf in leaves)])
    for mixed, plain in zip(*values, strict=True):
        assert_close(mixed, plain, 1e-5, "mixed precision")

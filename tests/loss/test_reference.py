"""The reference in reference.py against the golden trajectories of the authors' code, and against autograd."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import GLOBAL_TAU, INDIVIDUAL_TAU, AdamW, Reference, cosine_lr, gamma_at, open_clip_loss
from trajectories import (
    GOLDEN_LOSSES,
    LOSSES,
    RUNS,
    TOLERANCE,
    TOTAL_STEPS,
    assert_close,
    batches,
    golden,
    golden_settings,
    hyperparameters,
    problem,
    table_tolerance,
    unit,
)


class TinyModel:
    """Two linear maps, feature = normalize(x @ W.T), trained by AdamW under the golden runs' cosine; no autograd."""

    def __init__(self, loss):
        self.h = hyperparameters(loss)
        self.maps = {"image": problem()["w_im0"], "text": problem()["w_tt0"]}
        self.inputs = {"image": problem()["x"], "text": problem()["y"]}
        self.optimizers = {side: AdamW(self.h.beta1, self.h.beta2, self.h.eps, self.h.wd) for side in self.maps}
        self.steps = 0

    def features(self, side, ids):
        mapped = self.inputs[side][ids] @ self.maps[side].T
        return mapped / np.linalg.norm(mapped, axis=1, keepdims=True)

    def map_gradient(self, side, ids, feature_gradient):
        feature = self.features(side, ids)
        norm = np.linalg.norm(self.inputs[side][ids] @ self.maps[side].T, axis=1, keepdims=True)
        along = np.sum(feature * feature_gradient, axis=1, keepdims=True)
        return ((feature_gradient - along * feature) / norm).T @ self.inputs[side][ids]

    def train(self, map_gradients):
        lr = self.lr()
        for side, gradient in map_gradients.items():
            self.maps[side] = self.optimizers[side].moved(self.maps[side], gradient, lr)
        self.steps += 1

    def lr(self):
        return cosine_lr(self.steps, self.h.lr, self.h.warmup, TOTAL_STEPS)


def side_key(side):
    return {"image": "im", "text": "tt"}[side]


@pytest.mark.parametrize("precision", RUNS)
@pytest.mark.parametrize("loss", GOLDEN_LOSSES)
def test_reference_follows_the_released_trajectory(loss, precision):
    expected, world_size = golden(loss, precision), RUNS[precision][1]
    config = SimpleNamespace(**golden_settings(loss))
    reference, model = Reference(config), TinyModel(loss)
    tolerance, loose = TOLERANCE[precision], table_tolerance(loss, precision)
    for t, (epoch, ids) in enumerate(batches(16)):
        where = f"{loss} {precision} step {t}"
        assert np.array_equal(ids, expected["idx"][t].ravel())
        assert_close(gamma_at(config, epoch), expected["gamma"][t], tolerance, f"{where} gamma")
        assert_close(model.lr(), expected["lr"][t], tolerance, f"{where} lr")
        features = {side: model.features(side, ids) for side in ("image", "text")}
        step = reference.step(features["image"], features["text"], ids, epoch)
        assert_close(step.surrogate, expected["loss"][t].mean(), tolerance, f"{where} surrogate loss")
        gradients = {"image": step.grad_image, "text": step.grad_text}
        map_gradients = {}
        for side, gradient in gradients.items():
            key = side_key(side)
            assert_close(features[side], expected[f"f_{key}"][t].reshape(16, -1), tolerance, f"{where} features")
            per_rank = expected[f"gf_{key}"][t].reshape(16, -1) / world_size
            assert_close(gradient, per_rank, tolerance, f"{where} {side} gradient")
            map_gradients[side] = model.map_gradient(side, ids, gradient)
            assert_close(map_gradients[side], expected[f"gw_{key}"][t], tolerance, f"{where} {side} map gradient")
            assert_close(np.exp(reference.log_u[side]), expected[f"u_{key}"][t], loose, f"{where} u {side}")
            scale = np.exp(expected[f"bound_{key}"][t][ids]) if loss in INDIVIDUAL_TAU else 1.0
            assert_close(step.g[side], expected[f"g_{key}"][t].ravel() * scale, loose, f"{where} g {side}")
            if loss in INDIVIDUAL_TAU:
                assert_close(reference.tau[side], expected[f"tau_{key}"][t], tolerance, f"{where} tau {side}")
                assert_close(reference.tau_m[side], expected[f"m_grad_tau_{key}"][t], loose, f"{where} m {side}")
                assert_close(reference.tau_v[side], expected[f"v_grad_tau_{key}"][t], loose, f"{where} v {side}")
        if loss in GLOBAL_TAU:  # the golden gradient is that of s = 1/tau: d tau / d s = -tau^2
            tau = 1 / expected["s_before"][t]
            expected_gradient = -expected["g_s"][t].mean() / tau**2
            assert_close(reference.tau_gradient, expected_gradient, tolerance, f"{where} tau gradient")
        assert_close(reference.log_inv_tau, expected["logit_scale_after"][t], tolerance, f"{where} log(1/tau)")
        model.train(map_gradients)
    assert_close(model.maps["image"], expected["w_im_final"], tolerance, "final image map")
    assert_close(model.maps["text"], expected["w_tt_final"], tolerance, "final text map")


@pytest.mark.parametrize("precision", RUNS)
def test_open_clip_follows_its_trajectory(precision):
    expected, world_size, tolerance = golden("openclip", precision), RUNS[precision][1], TOLERANCE[precision]
    model, h = TinyModel("openclip"), hyperparameters("openclip")
    log_scale, scale_optimizer = math.log(1 / 0.07), AdamW(h.beta1, h.beta2, h.eps)
    for t, (_, ids) in enumerate(batches(16)):
        where = f"openclip {precision} step {t}"
        scale = math.exp(log_scale)
        image, text = model.features("image", ids), model.features("text", ids)
        value, *gradients, scale_gradient = open_clip_loss(image, text, scale)
        assert_close(value, expected["loss"][t].mean(), tolerance, f"{where} value")
        map_gradients = {}
        for side, gradient in zip(("image", "text"), gradients, strict=True):
            key = side_key(side)
            per_rank = expected[f"gf_{key}"][t].reshape(16, -1) / world_size
            assert_close(gradient, per_rank, tolerance, f"{where} {side} gradient")
            map_gradients[side] = model.map_gradient(side, ids, gradient)
            assert_close(map_gradients[side], expected[f"gw_{key}"][t], tolerance, f"{where} {side} map gradient")
        assert_close(scale_gradient, expected["g_s"][t].mean(), tolerance, f"{where} scale gradient")
        lr = cosine_lr(t, h.lr_tau, h.warmup, TOTAL_STEPS)
        log_scale = min(max(scale_optimizer.moved(log_scale, scale * scale_gradient, lr), 0.0), math.log(100))
        assert_close(log_scale, expected["logit_scale_after"][t], tolerance, f"{where} log scale")
        model.train(map_gradients)
    assert_close(model.maps["image"], expected["w_im_final"], tolerance, "final image map")
    assert_close(model.maps["text"], expected["w_tt_final"], tolerance, "final text map")


def random_rows(rng, rows, width):
    return unit(rng.standard_normal((rows, width)))


def g_by_autograd(anchor, other, tau):
    """g [B] as a differentiable expression of the features and of tau (a number or [B])."""
    cosine = anchor @ other.T
    h = (cosine - cosine.diagonal()[:, None]) / tau.reshape(-1, 1)
    off_diagonal = 1 - torch.eye(len(anchor), dtype=torch.float64)
    return (h.exp() * off_diagonal).sum(dim=1) / (len(anchor) - 1)


def objective(config, g_1, g_2, tau_1, tau_2):
    """The objectives of the paper, mean over the batch."""
    log_1, log_2 = (config.eps + g_1).log(), (config.eps + g_2).log()
    if config.loss == "fastclip-v0":
        return (log_1 + log_2).mean()
    if config.loss in INDIVIDUAL_TAU:
        return (tau_1 * (log_1 + config.rho) + tau_2 * (log_2 + config.rho)).mean()
    margin = 2 * config.rho * tau_1.mean() if config.loss == "fastclip-v3" else 0.0
    return (tau_1 * (log_1 + log_2)).mean() + margin


def torch_inputs(image, text, tau_image, tau_text):
    arrays = (image, text, tau_image, tau_text)
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


@pytest.mark.parametrize("eps", [1e-14, 1e-2])
@pytest.mark.parametrize("loss", LOSSES)
def test_paper_gradients_are_autograd_of_the_objective_when_u_is_g(loss, eps):
    rng = np.random.default_rng(0)
    size, temperature = 6, 0.2
    changes = {"gradients": "paper", "temperature": temperature, "eps": eps, "num_samples": size, "rho": 0.3}
    config = SimpleNamespace(**golden_settings(loss, **changes))
    reference = Reference(config)
    ids, image, text = np.arange(size), random_rows(rng, size, 4), random_rows(rng, size, 4)
    step = reference.step(image, text, ids, epoch=0)

    e_1, e_2, tau_1, tau_2 = torch_inputs(image, text, np.full(size, temperature), np.full(size, temperature))
    value = objective(config, g_by_autograd(e_1, e_2, tau_1), g_by_autograd(e_2, e_1, tau_2), tau_1, tau_2)
    value.backward()
    assert_close(step.value, value.item(), 1e-12, "value")
    assert_close(step.grad_image, e_1.grad, 1e-12, "image gradient")
    assert_close(step.grad_text, e_2.grad, 1e-12, "text gradient")
    if loss in GLOBAL_TAU:
        assert_close(reference.tau_gradient, (tau_1.grad + tau_2.grad).sum().item(), 1e-12, "tau gradient")
    if loss in INDIVIDUAL_TAU:  # N = B here, so the mean over the batch is the mean over the data set
        assert np.abs(reference.tau_gradient["image"]).max() < 5 / size, "the clamp must not act in this test"
        assert_close(reference.tau_gradient["image"], tau_1.grad, 1e-12, "image tau gradient")
        assert_close(reference.tau_gradient["text"], tau_2.grad, 1e-12, "text tau gradient")


@pytest.mark.parametrize("gradients", ["released", "paper"])
@pytest.mark.parametrize("loss", LOSSES)
def test_feature_gradient_is_the_estimator_when_u_remembers(loss, gradients):
    rng = np.random.default_rng(1)
    size, eps = 6, 1e-2
    config = SimpleNamespace(**golden_settings(loss, gradients=gradients, eps=eps, num_samples=size))
    reference, ids = Reference(config), np.arange(size)
    for epoch in (0, 1):  # epoch 1 has gamma 0.6 or 0.2
        image, text = random_rows(rng, size, 4), random_rows(rng, size, 4)
        tau = {side: reference.tau[side].copy() for side in reference.tau}
        if loss not in INDIVIDUAL_TAU:
            tau = dict.fromkeys(tau, np.full(size, reference.temperature()))
        step = reference.step(image, text, ids, epoch)

    e_1, e_2, tau_1, tau_2 = torch_inputs(image, text, tau["image"], tau["text"])
    factor = 1.0 if gradients == "paper" else 0.5
    c_1 = c_2 = torch.tensor(factor, dtype=torch.float64)
    if loss == "fastclip-v3" or (gradients == "paper" and loss != "fastclip-v0"):
        c_1, c_2 = factor * tau_1.detach(), factor * tau_2.detach()
    u = {side: torch.tensor(np.exp(reference.log_u[side])) for side in ("image", "text")}
    estimator = (
        c_1 * g_by_autograd(e_1, e_2, tau_1) / (eps + u["image"])
        + c_2 * g_by_autograd(e_2, e_1, tau_2) / (eps + u["text"])
    ).mean()
    estimator.backward()
    assert_close(step.grad_image, e_1.grad, 1e-12, "image gradient")
    assert_close(step.grad_text, e_2.grad, 1e-12, "text gradient")


def test_first_visit_takes_g_and_later_visits_blend():
    rng = np.random.default_rng(2)
    config = SimpleNamespace(**golden_settings("fastclip-v1", num_samples=8))
    reference = Reference(config)
    first = reference.step(random_rows(rng, 4, 3), random_rows(rng, 4, 3), np.arange(4), epoch=1)
    second = reference.step(random_rows(rng, 4, 3), random_rows(rng, 4, 3), np.arange(2, 6), epoch=1)
    u = np.exp(reference.log_u["image"])
    assert_close(u[:2], first.g["image"][:2], 1e-14, "visited once")
    assert_close(u[2:4], 0.4 * first.g["image"][2:] + 0.6 * second.g["image"][:2], 1e-14, "visited twice")
    assert_close(u[4:6], second.g["image"][2:], 1e-14, "first visit with gamma 0.6")
    assert np.all(u[6:] == 0), "never visited"


@pytest.mark.parametrize("loss", LOSSES)
def test_copies_of_one_id_are_no_negatives_and_the_last_copy_counts(loss):
    rng = np.random.default_rng(3)
    config = SimpleNamespace(**golden_settings(loss, temperature=0.5, num_samples=4))
    reference = Reference(config)
    image, text, ids = random_rows(rng, 4, 3), random_rows(rng, 4, 3), np.array([2, 0, 2, 1])
    step = reference.step(image, text, ids, epoch=0)
    # By hand: id 2 stands at rows 0 and 2, row 2 is the last; its only candidates are rows 1 and 3; B - 1 = 3.
    h = [(image[2] @ text[j] - image[2] @ text[2]) / 0.5 for j in (1, 3)]
    assert_close(reference.log_u["image"][2], math.log((math.exp(h[0]) + math.exp(h[1])) / 3), 1e-14, "log u of id 2")
    assert step.g["image"][0] != pytest.approx(step.g["image"][2]), "the copies differ, or this test tests nothing"
    assert np.isneginf(reference.log_u["image"][3])
    assert np.all(np.isfinite(step.grad_image)) and np.isfinite(step.value)

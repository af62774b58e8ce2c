"""Slow, obvious float64 reference of one step of every algorithm: double loops over pairs, no autograd, one process.

Source: FastCLIP, arXiv 2407.01445, Algorithm 1 with its objectives GCL, RGCL and RGCL-g; the "released" gradients are
those of the authors' code. It shares no arithmetic with the package, so it can witness for it. Symbols: B pairs in the
global batch, d embedding width, N samples in the data set.
"""

import math
from dataclasses import dataclass

import numpy as np

SIDES = ("image", "text")  # side a is the anchor, the other side gives the candidates
GLOBAL_TAU = ("fastclip-v0", "fastclip-v3")
INDIVIDUAL_TAU = ("fastclip-v2", "isogclr")
TAU_GRADIENT_BOUND, TAU_MIN, TAU_MAX, MAX_LOG_INVERSE_TAU = 5.0, 0.01, 1.0, math.log(100)


def gamma_at(config, epoch):
    """Weight of the new g in u during `epoch` (0-based): 1 in epoch 0, then down to config.gamma."""
    if epoch == 0:
        return 1.0
    if config.gamma_schedule == "constant" or epoch >= config.gamma_decay_epochs:
        return config.gamma
    return 0.5 * (1 + math.cos(math.pi * epoch / config.gamma_decay_epochs)) * (1 - config.gamma) + config.gamma


def cosine_lr(step, peak, warmup_steps, total_steps, floor=0.0):
    """OpenCLIP's learning rate at `step` (0-based): linear warm-up, then half a cosine to `floor` at total_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """torch.optim.AdamW for one float64 array or number."""

    def __init__(self, beta1, beta2, eps, weight_decay=0.0):
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.m, self.v, self.steps = 0.0, 0.0, 0

    def moved(self, parameter, gradient, lr):
        self.steps += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m_hat = self.m / (1 - self.beta1**self.steps)
        v_hat = self.v / (1 - self.beta2**self.steps)
        return parameter * (1 - lr * self.weight_decay) - lr * m_hat / (np.sqrt(v_hat) + self.eps)


@dataclass
class Step:
    """What one step returns. The gradients are those of the global objective, [B, d]."""

    value: float  # the objective with u in place of g, at the step's old tau
    surrogate: float  # what the released code returns, mean over its ranks
    grad_image: np.ndarray
    grad_text: np.ndarray
    g: dict  # side -> [B], before equal ids are merged


class Reference:
    """State over all N samples and the step that moves it. `config` is any object with FastCLIPConfig's fields."""

    def __init__(self, config):
        self.config = config
        n = config.num_samples
        self.log_u = {side: np.full(n, -np.inf) for side in SIDES}
        self.log_inv_tau = math.log(1 / config.temperature)
        self.tau_optimizer = AdamW(config.beta1, config.beta2, config.adam_eps)
        self.tau = {side: np.full(n, config.temperature) for side in SIDES}
        self.tau_m = {side: np.zeros(n) for side in SIDES}
        self.tau_v = {side: np.zeros(n) for side in SIDES}
        self.step_count = 0

    def step(self, image, text, ids, epoch):
        """One global batch: image, text [B, d] float64, L2-normalised; ids [B] integers in rank order."""
        features = {"image": image, "text": text}
        tau = {side: self._tau_of(side, ids) for side in SIDES}  # [B], the old tau: used in the whole step
        g, dg_dtau, u = {}, {}, {}
        for side in SIDES:
            g[side], dg_dtau[side] = inner_function(features, side, ids, tau[side])
            self._move_u(side, ids, g[side], gamma_at(self.config, epoch))
            u[side] = np.exp(self.log_u[side][ids])  # equal ids: the value that the last copy stored
        value, surrogate = self._value(tau, u), self._surrogate(tau, g, u)
        gradients = self._feature_gradients(features, ids, tau, u)
        last = [max(k for k in range(len(ids)) if ids[k] == i) for i in ids]  # position of the last copy of each id
        dg_dtau = {side: dg_dtau[side][last] for side in SIDES}
        if self.config.loss in GLOBAL_TAU:
            self._move_global_tau(tau["image"][0], u, dg_dtau)
        if self.config.loss in INDIVIDUAL_TAU:
            self._move_individual_tau(ids, tau, u, dg_dtau, epoch)
        self.step_count += 1
        return Step(value, surrogate, gradients["image"], gradients["text"], g)

    def temperature(self):
        """The global tau in force, or the mean of the individual ones."""
        if self.config.loss in INDIVIDUAL_TAU:
            return np.mean([self.tau[side] for side in SIDES])
        return math.exp(-self.log_inv_tau)

    def _tau_of(self, side, ids):
        return self.tau[side][ids] if self.config.loss in INDIVIDUAL_TAU else np.full(len(ids), self.temperature())

    def _move_u(self, side, ids, g, gamma):
        before = np.exp(self.log_u[side])
        for i, g_i in zip(ids, g, strict=True):  # in rank order, so that the last copy of an id wins
            first_visit = before[i] == 0
            u_i = g_i if first_visit else (1 - gamma) * before[i] + gamma * g_i
            self.log_u[side][i] = math.log(u_i)

    def _value(self, tau, u):
        c, log = self.config, {side: np.log(self.config.eps + u[side]) for side in SIDES}
        if c.loss == "fastclip-v0":
            return np.mean(log["image"] + log["text"])
        if c.loss in INDIVIDUAL_TAU:
            return np.mean(sum(tau[side] * (log[side] + c.rho) for side in SIDES))
        margin = 2 * c.rho * tau["image"][0] if c.loss == "fastclip-v3" else 0.0
        return np.mean(tau["image"] * (log["image"] + log["text"])) + margin

    def _surrogate(self, tau, g, u):
        c = self.config
        ratios = np.mean(sum(g[side] / (c.eps + u[side]) for side in SIDES))
        if c.loss != "fastclip-v3":
            return ratios
        mean_log_u = np.mean(np.log(u["image"]) + np.log(u["text"]))
        return tau["image"][0] * (ratios + c.rho + mean_log_u / 2)

    def _factor(self, tau):
        """c of the gradient estimator, [B]: the factor in front of each anchor's d g / (eps + u)."""
        one = np.ones_like(tau)
        if self.config.gradients == "released":
            return 0.5 * (tau if self.config.loss == "fastclip-v3" else one)
        return one if self.config.loss == "fastclip-v0" else tau

    def _feature_gradients(self, features, ids, tau, u):
        """Gradient of mean_i [c d g_1,i / (eps + u_1,i) + c d g_2,i / (eps + u_2,i)] with u held constant."""
        gradient = {side: np.zeros_like(features[side]) for side in SIDES}
        size = len(ids)
        for anchor, other in (SIDES, SIDES[::-1]):
            factor = self._factor(tau[anchor])
            for i in range(size):
                for j in range(size):
                    if ids[i] == ids[j]:
                        continue
                    a_i, o_i, o_j = features[anchor][i], features[other][i], features[other][j]
                    h = (a_i @ o_j - a_i @ o_i) / tau[anchor][i]
                    weight = factor[i] / size * math.exp(h) / (size - 1) / (self.config.eps + u[anchor][i])
                    gradient[anchor][i] += weight * (o_j - o_i) / tau[anchor][i]
                    gradient[other][j] += weight * a_i / tau[anchor][i]
                    gradient[other][i] -= weight * a_i / tau[anchor][i]
        return gradient

    def _move_global_tau(self, tau, u, dg_dtau):
        c = self.config
        gradient = sum(np.mean(dg_dtau[side] / (c.eps + u[side])) for side in SIDES)  # v0, both kinds
        if c.loss == "fastclip-v3" and c.gradients == "released":
            gradient = tau * gradient + c.rho + sum(np.mean(np.log(u[side])) for side in SIDES) / 2
        elif c.loss == "fastclip-v3":
            gradient = tau * gradient + 2 * c.rho + sum(np.mean(np.log(c.eps + u[side])) for side in SIDES)
        self.tau_gradient = gradient
        moved = self.tau_optimizer.moved(self.log_inv_tau, -tau * gradient, self._tau_lr(tau))
        self.log_inv_tau = min(max(moved, 0.0), MAX_LOG_INVERSE_TAU)

    def _tau_lr(self, tau):
        c = self.config
        if c.tau_lr_schedule == "cosine":
            floor = c.tau_lr * c.lr_min / c.lr
            return cosine_lr(self.step_count, c.tau_lr, c.warmup_steps, c.total_steps, floor)
        if c.tau_lr_schedule == "step_thresh" and tau <= 0.03:
            return c.tau_lr / 3
        return c.tau_lr

    def _move_individual_tau(self, ids, tau, u, dg_dtau, epoch):
        c = self.config
        beta1, beta2 = (c.beta1, c.beta2) if epoch > 0 else (0.0, 0.0)
        self.tau_gradient = {}
        for side in SIDES:
            eps_u = c.eps + u[side]
            gradient = np.log(eps_u) + c.rho + tau[side] * dg_dtau[side] / eps_u
            gradient = np.clip(gradient, -TAU_GRADIENT_BOUND, TAU_GRADIENT_BOUND)
            if c.gradients == "paper":
                gradient = gradient / c.num_samples
            self.tau_gradient[side] = gradient
            m = beta1 * self.tau_m[side][ids] + (1 - beta1) * gradient
            v = beta2 * self.tau_v[side][ids] + (1 - beta2) * gradient**2
            m_hat, v_hat = m / (1 - beta1 ** (epoch + 1)), v / (1 - beta2 ** (epoch + 1))
            moved = tau[side] - self._tau_lr(None) * m_hat / (np.sqrt(v_hat) + c.adam_eps)
            # Copies of one id carry equal values here, so the order of these writes does not matter.
            self.tau_m[side][ids], self.tau_v[side][ids] = m, v
            self.tau[side][ids] = np.clip(moved, TAU_MIN, TAU_MAX)


def inner_function(features, anchor, ids, tau):
    """g_a,i = 1/(B-1) sum_j exp(h_a,ij) over all j whose id differs, and its derivative in tau_i: two arrays [B]."""
    (other,) = set(SIDES) - {anchor}
    size = len(ids)
    g, dg_dtau = np.zeros(size), np.zeros(size)
    for i in range(size):
        for j in range(size):
            if ids[i] != ids[j]:
                h = features[anchor][i] @ (features[other][j] - features[other][i]) / tau[i]
                g[i] += math.exp(h) / (size - 1)
                dg_dtau[i] += math.exp(h) * (-h / tau[i]) / (size - 1)
    return g, dg_dtau


def open_clip_loss(image, text, scale):
    """Symmetric cross-entropy over the global batch: value, gradients of image and text [B, d] and of the scale."""
    cosine = image @ text.T
    size = len(image)
    by_row = np.exp(scale * cosine) / np.exp(scale * cosine).sum(axis=1, keepdims=True)
    by_column = np.exp(scale * cosine) / np.exp(scale * cosine).sum(axis=0, keepdims=True)
    value = -np.mean(np.log(np.diag(by_row)) + np.log(np.diag(by_column))) / 2
    wrt_logits = (by_row + by_column - 2 * np.eye(size)) / (2 * size)
    return value, scale * wrt_logits @ text, scale * wrt_logits.T @ image, np.sum(wrt_logits * cosine)

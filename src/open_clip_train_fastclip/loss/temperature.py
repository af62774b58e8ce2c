"""The four rules that move tau. A global tau is kept as log(1/tau), OpenCLIP's logit_scale, clamped to [0, ln 100].

Symbols (paper, Section 4): A = tau mean_i[d_tau g_1,i / (eps + u_1,i) + d_tau g_2,i / (eps + u_2,i)].
"""

import math

import torch
from torch import Tensor

from .config import GCL_WITHOUT_TAU, TAU_MAX, TAU_MIN, FastCLIPConfig
from .own_tensors import OwnTensors
from .schedules import cosine_lr_at

GRADIENT_CLAMP = 5.0  # of an individual tau
STEP_THRESHOLD, STEP_FACTOR = 0.03, 1 / 3  # "step_thresh": at or below this tau its rate has that factor


def tau_lr_at(config: FastCLIPConfig, step: int, tau: Tensor) -> Tensor:
    """Learning rate of tau in `step` (0-based), a 0-d tensor."""
    peak = config.tau_lr
    if config.tau_lr_schedule == "cosine":
        peak *= cosine_lr_at(step, config.lr, config.warmup_steps, config.total_steps, config.lr_min) / config.lr
    rate = torch.full_like(tau, peak)
    if config.tau_lr_schedule == "step_thresh":
        rate = torch.where(tau <= STEP_THRESHOLD, rate * STEP_FACTOR, rate)
    return rate


class GlobalTemperature(OwnTensors):
    """One temperature for all samples: constant (sogclr, v1) or learned by AdamW without weight decay (v0, v3)."""

    NAMES = ("log_inv_tau", "m", "v", "steps")
    log_inv_tau: Tensor  # log(1/tau), 0-d like the others
    m: Tensor
    v: Tensor
    steps: Tensor

    def __init__(self, config: FastCLIPConfig):
        super().__init__()
        self.config = config
        dtype = config.table_dtype
        self.own("log_inv_tau", torch.tensor(-math.log(config.temperature), dtype=dtype))
        for name in self.NAMES[1:]:
            self.own(name, torch.zeros((), dtype=dtype))

    def tau(self) -> Tensor:
        """tau in force, a 0-d tensor."""
        return torch.exp(-self.log_inv_tau)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors of NAMES, which move() replaces and does not change."""
        return tuple(getattr(self, name) for name in self.NAMES)

    def put(self, state: tuple[Tensor, ...]) -> None:
        """Put back what `state` was."""
        for name, value in zip(self.NAMES, state, strict=True):
            setattr(self, name, value)

    def gradient(self, a: Tensor, mean_log_u: Tensor, mean_log_eps_u: Tensor) -> Tensor:
        """Gradient of the objective w.r.t. tau. mean_log_u is L = mean_i[log u_1,i + log u_2,i], then with eps."""
        if self.config.algorithm.objective == GCL_WITHOUT_TAU:
            return a / self.tau()
        if self.config.gradients == "released":
            return a + self.config.rho + mean_log_u / 2
        return a + 2 * self.config.rho + mean_log_eps_u

    def move(self, gradient: Tensor, rate: Tensor, usable: Tensor) -> None:
        """One AdamW step on log(1/tau) with the gradient w.r.t. tau; nothing moves where `usable` is False."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        usable = usable & gradient.isfinite()
        gradient = -self.tau() * gradient  # d tau / d log(1/tau) = -tau
        steps = self.steps + 1
        m = beta1 * self.m + (1 - beta1) * gradient
        v = beta2 * self.v + (1 - beta2) * gradient.square()
        update = (m / (1 - beta1**steps)) / ((v / (1 - beta2**steps)).sqrt() + self.config.adam_eps)
        log_inv_tau = (self.log_inv_tau - rate * update).clamp(0, -math.log(TAU_MIN))
        moved = zip((log_inv_tau, m, v, steps), self.state, strict=True)
        self.put(tuple(torch.where(usable, new, old) for new, old in moved))


def move_individual(
    config: FastCLIPConfig, tau: Tensor, m: Tensor, v: Tensor, gradient: Tensor, rate: Tensor, epoch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam step on temperatures of single samples (v2, isogclr), elementwise; returns the new tau, m, v.

    `gradient` is that of the sample's own term. As published: no memory of moments in epoch 0, the exponent of the
    bias correction is the number of the epoch, and tau stays in its range.
    """
    gradient = gradient.clamp(-GRADIENT_CLAMP, GRADIENT_CLAMP)
    if config.gradients == "paper":
        gradient = gradient / config.num_samples
    beta1, beta2 = (config.beta1, config.beta2) if epoch > 0 else (0.0, 0.0)
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient.square()
    correction1, correction2 = 1 - beta1 ** (epoch + 1), 1 - beta2 ** (epoch + 1)
    tau = tau - rate * (m / correction1) / ((v / correction2).sqrt() + config.adam_eps)
    return tau.clamp(TAU_MIN, TAU_MAX), m, v

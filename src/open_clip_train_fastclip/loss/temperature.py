"""The four rules that move tau. A global tau is kept as log(1/tau), OpenCLIP's logit_scale, clamped to [0, ln 100].

Symbols (paper, Section 4): a = tau mean_i[d_tau g_1,i / (eps + u_1,i) + d_tau g_2,i / (eps + u_2,i)].
"""

import math

import torch
from torch import Tensor

from .config import GCL_WITHOUT_TAU, TAU_MAX, TAU_MIN, FastCLIPConfig
from .own_tensors import OwnTensors
from .schedules import cosine_lr_at

GRADIENT_CLAMP = 5.0  # of an individual tau
STEP_THRESHOLD, STEP_FACTOR = 0.03, 1 / 3  # "step_thresh": at or below this tau its rate has that factor


def peak_tau_lr_at(config: FastCLIPConfig, step: int) -> float:
    """Learning rate of tau in `step` (0-based), but for what depends on tau itself."""
    if config.tau_lr_schedule != "cosine":
        return config.tau_lr
    return (
        config.tau_lr
        * cosine_lr_at(step, config.lr, config.warmup_steps, config.total_steps, config.lr_min)
        / config.lr
    )


def tau_lr_at(config: FastCLIPConfig, peak: Tensor, tau: Tensor) -> Tensor:
    """Learning rate of tau, 0-d like both arguments. peak: peak_tau_lr_at()."""
    if config.tau_lr_schedule == "step_thresh":
        return torch.where(tau <= STEP_THRESHOLD, peak * STEP_FACTOR, peak)
    return peak


class GlobalTemperature(OwnTensors):
    """One temperature for all samples: constant (sogclr, v1) or learned by AdamW without weight decay (v0, v3)."""

    NAMES = ("log_inv_tau", "m", "v", "steps")
    numbers: Tensor  # [4], in the order of NAMES; a move replaces it and does not change it

    def __init__(self, config: FastCLIPConfig):
        super().__init__()
        start = [-math.log(config.temperature), 0.0, 0.0, 0.0]
        self.own("numbers", torch.tensor(start, dtype=config.table_dtype))

    @property
    def log_inv_tau(self) -> Tensor:
        """log(1/tau), a 0-d view."""
        return self.numbers[0]

    def tau(self) -> Tensor:
        """tau in force, a 0-d tensor."""
        return torch.exp(-self.log_inv_tau)


def global_gradient(config: FastCLIPConfig, a: Tensor, log_u: Tensor, log_eps_u: Tensor, tau: Tensor) -> Tensor:
    """Gradient of the objective w.r.t. the one tau, 0-d. log_u and log_eps_u [B, 2]: of the new u, then with eps."""
    if config.algorithm.objective == GCL_WITHOUT_TAU:
        return a / tau
    if config.gradients == "released":
        return a + config.rho + log_u.mean()  # the mean of 2B is half of L = mean_i[log u_1,i + log u_2,i]
    return a + 2 * config.rho + 2 * log_eps_u.mean()


def move_global(
    config: FastCLIPConfig, numbers: Tensor, gradient: Tensor, rate: Tensor, tau: Tensor, usable: Tensor
) -> Tensor:
    """One AdamW step on log(1/tau) with the gradient w.r.t. tau: the new GlobalTemperature.numbers.

    Nothing moves where `usable` is False, or if the gradient is not finite.
    """
    usable = usable & (gradient.abs() < math.inf)
    gradient = gradient * -tau  # d tau / d log(1/tau) = -tau
    log_inv_tau, m, v, steps = numbers.unbind()
    steps = steps + 1
    m = m.lerp(gradient, 1 - config.beta1)
    v = v.lerp(gradient.square(), 1 - config.beta2)
    update = m / (1 - config.beta1**steps) / ((v / (1 - config.beta2**steps)).sqrt() + config.adam_eps)
    log_inv_tau = (log_inv_tau - rate * update).clamp(0, -math.log(TAU_MIN))
    return torch.where(usable, torch.stack([log_inv_tau, m, v, steps]), numbers)


def individual_adam_at(config: FastCLIPConfig, epoch: int) -> tuple[float, float, float, float]:
    """1 - beta1, 1 - beta2 and the bias corrections of both moments in `epoch` (0-based), for move_individual().

    As published: no memory of moments in epoch 0, and the exponent of the correction is the number of the epoch.
    """
    beta1, beta2 = (config.beta1, config.beta2) if epoch > 0 else (0.0, 0.0)
    return 1 - beta1, 1 - beta2, 1 - beta1 ** (epoch + 1), 1 - beta2 ** (epoch + 1)


def move_individual(
    config: FastCLIPConfig, moments: tuple[Tensor, ...], gradient: Tensor, rate: Tensor, adam: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam step on temperatures of single samples (v2, isogclr), elementwise; returns the new tau, m, v.

    moments: the old tau, m, v; `gradient` is that of the sample's own term; adam: individual_adam_at(), 0-d each.
    tau stays in its range.
    """
    tau, m, v = moments
    weight1, weight2, correction1, correction2 = adam
    gradient = gradient.clamp(-GRADIENT_CLAMP, GRADIENT_CLAMP)
    if config.gradients == "paper":
        gradient = gradient / config.num_samples
    m, v = m.lerp(gradient, weight1), v.lerp(gradient.square(), weight2)
    tau = tau - rate * (m / correction1) / ((v / correction2).sqrt() + config.adam_eps)
    return tau.clamp(TAU_MIN, TAU_MAX), m, v

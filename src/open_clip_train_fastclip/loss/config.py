"""FastCLIPConfig: every setting of the algorithms, checked when it is made; and what sets the algorithms apart."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError

CONSTANT, GLOBAL, INDIVIDUAL = "constant", "global", "individual"  # temperatures: see Algorithm.tau
# Objectives of the paper; GCL_WITHOUT_TAU is GCL without its factor tau.
GCL, GCL_WITHOUT_TAU, RGCL, RGCL_G = "GCL", "GCL without the factor tau", "RGCL", "RGCL-g"
GAMMA_SCHEDULES = ("cosine", "constant")
TAU_LR_SCHEDULES = ("cosine", "const", "step_thresh")
GRADIENTS = ("released", "paper")
# Matrix products in float32; the two of the gradient in TF32; all in TF32, where the device has it: see precision.py.
PRODUCTS = ("exact", "tf32-gradient", "tf32")
PUBLISHED_EPS = 1e-14


@dataclass(frozen=True)
class Algorithm:
    """What sets one loss apart: its objective, its temperature, and the defaults of its settings.

    This is the only place where those defaults are written: the flags' help and the documentation take them from here.
    """

    objective: str
    tau: str  # CONSTANT; GLOBAL: one, learned; INDIVIDUAL: one per sample and modality, learned
    gamma_schedule: str = "cosine"
    temperature: float = 0.07  # at the start
    eps: float = 1e-4  # published: PUBLISHED_EPS; docs/choosing.md has what was measured
    rho: float = 0.0  # margin, as published for a global batch of PUBLISHED_BATCH; 0: the objective has none
    tau_lr: float = 0.0  # learning rate of the temperature, or
    tau_lr_divisor: int = 0  # the model's rate divided by this
    tau_lr_schedule: str = "const"


ALGORITHMS = {
    "sogclr": Algorithm(GCL, CONSTANT, gamma_schedule="constant"),
    # RGCL's log(eps + u) must be able to fall below -rho, which is above 9 at the batches of many GPUs.
    "isogclr": Algorithm(
        RGCL, INDIVIDUAL, gamma_schedule="constant", temperature=0.03, eps=PUBLISHED_EPS, rho=7.0, tau_lr=0.0133
    ),
    "fastclip-v0": Algorithm(GCL_WITHOUT_TAU, GLOBAL, tau_lr_divisor=1, tau_lr_schedule="cosine"),
    "fastclip-v1": Algorithm(GCL, CONSTANT),
    "fastclip-v2": Algorithm(RGCL, INDIVIDUAL, temperature=0.03, eps=PUBLISHED_EPS, rho=7.0, tau_lr=0.0133),
    "fastclip-v3": Algorithm(RGCL_G, GLOBAL, rho=6.5, tau_lr_divisor=5, tau_lr_schedule="step_thresh"),
}
LOSSES = tuple(ALGORITHMS)

TAU_MIN, TAU_MAX = 0.01, 1.0  # the range that OpenCLIP's clamp of logit_scale to [0, ln 100] allows
GAMMA_FACTOR, GAMMA_POWER = 4.177, -0.7265  # of the default of gamma, over the visits of a sample
PUBLISHED_BATCH = 1024  # global batch of the runs whose rho was published
LEAST_DEFAULT_RHO = 1.0
MOST_EPOCHS, MOST = 2**31 - 1, 1e30  # a factor up to MOST, and what it is multiplied by, is finite in float32
BY_LOSS: Any = None  # a field that __post_init__ fills with the default of the loss


def losses_with(tau: str) -> tuple[str, ...]:
    """The losses with that kind of temperature."""
    return tuple(loss for loss, algorithm in ALGORITHMS.items() if algorithm.tau == tau)


def default_gamma(visits: float) -> float:
    """Smallest gamma of the schedule for a run that sees every sample so many times: the authors' later rule.

    They give it for epochs of the whole data set: a power of them, and at most 1. What u remembers, it takes from the
    visits of its sample.
    """
    return min(1.0, GAMMA_FACTOR * math.pow(max(visits, 1), GAMMA_POWER))


def default_rho(loss: str, global_batch_size: int) -> float:
    """The published rho for a global batch of B pairs: in proportion to ln(B-1), and not below LEAST_DEFAULT_RHO.

    One batch bounds the KL divergence that rho stands for by ln(B-1), so a small batch needs a smaller rho.
    Losses without rho get 0.
    """
    published = ALGORITHMS[loss].rho
    if not published:
        return 0.0
    scaled = published * math.log(max(global_batch_size - 1, 1)) / math.log(PUBLISHED_BATCH - 1)
    return max(LEAST_DEFAULT_RHO, scaled)


@dataclass(frozen=True)
class FastCLIPConfig:
    """Settings of one FastCLIP run (paper: arXiv 2407.01445). A field of BY_LOSS, left out or None: see ALGORITHMS.

    Raises UserError (a ValueError) that names the field and the cure.
    """

    loss: str  # one of LOSSES
    num_samples: int  # N, rows of the per-sample table; ids are 0 .. N-1
    epochs: int = 32  # of the whole run, the horizon of gamma
    gamma: float = BY_LOSS  # gamma_min in (0, 1]; its default is that for epochs of all samples
    gamma_schedule: str = BY_LOSS  # one of GAMMA_SCHEDULES
    gamma_decay_epochs: int = BY_LOSS  # E, epochs until gamma_min is reached; by default half of the epochs
    rho: float = BY_LOSS  # margin of RGCL and RGCL-g; its default is the published one
    eps: float = BY_LOSS  # weight of an anchor's own pair beside u, in u's own unit
    temperature: float = BY_LOSS  # tau at the start
    tau_lr: float = BY_LOSS  # learning rate of tau
    tau_lr_schedule: str = BY_LOSS  # one of TAU_LR_SCHEDULES
    beta1: float = 0.9  # of tau's AdamW (v0, v3) or Adam (v2, isogclr)
    beta2: float = 0.999
    adam_eps: float = 1e-8
    lr: float = 5e-4  # the model's peak learning rate, the unit of the cosine of tau_lr
    warmup_steps: int = 0  # linear warm-up of the cosine, in steps
    total_steps: int | None = None  # length of the cosine in steps; None: no decay after the warm-up
    lr_min: float = 0.0  # floor of the model's cosine; tau_lr's cosine has the same floor relative to its peak
    gradients: str = "released"  # "released": the published code's; "paper": the paper's formulas
    products: str = BY_LOSS  # one of PRODUCTS; left out, FastCLIPLoss takes the default of the device it is made on
    table_dtype: torch.dtype = torch.float32  # of the table and of tau; float64 in tests

    def __post_init__(self) -> None:
        if self.loss not in ALGORITHMS:
            raise UserError(f"loss {self.loss!r} is unknown: choose one of {', '.join(LOSSES)}")
        algorithm = self.algorithm
        defaults = {
            "gamma": default_gamma(self.epochs),
            "gamma_schedule": algorithm.gamma_schedule,
            "gamma_decay_epochs": max(1, self.epochs // 2),
            "rho": default_rho(self.loss, PUBLISHED_BATCH),
            "eps": algorithm.eps,
            "temperature": algorithm.temperature,
            "tau_lr": self.lr / algorithm.tau_lr_divisor if algorithm.tau_lr_divisor else algorithm.tau_lr,
            "tau_lr_schedule": algorithm.tau_lr_schedule,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check()

    @property
    def algorithm(self) -> Algorithm:
        """What sets the loss apart."""
        return ALGORITHMS[self.loss]

    @property
    def individual_tau(self) -> bool:
        """Whether every sample has temperatures of its own."""
        return self.algorithm.tau == INDIVIDUAL

    @property
    def learns_global_tau(self) -> bool:
        """Whether one temperature is learned for all."""
        return self.algorithm.tau == GLOBAL

    def resolved(self) -> dict[str, float | int | str]:
        """The plain values that a resumed run must not derive anew, by the names of their fields (RESOLVED)."""
        return {name: getattr(self, name) for name in RESOLVED if getattr(self, name) is not None}

    def _check(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}: {rule}")

        def require_one_of(name: str, choices: tuple[str, ...]) -> None:
            require(getattr(self, name) in choices, name, f"choose {', '.join(choices[:-1])} or {choices[-1]}")

        require(self.num_samples >= 1, "num_samples", "the data set needs at least one sample")
        require(0 < self.gamma <= 1, "gamma", "it must be in (0, 1]; 1 switches the memory of u off")
        require_one_of("gamma_schedule", GAMMA_SCHEDULES)
        require(1 <= self.gamma_decay_epochs <= MOST_EPOCHS, "gamma_decay_epochs", f"it must be in [1, {MOST_EPOCHS}]")
        require(0 <= self.rho <= MOST, "rho", f"it must be 0 or more, up to {MOST:g}")
        require(0 < self.eps < 1, "eps", "it must be in (0, 1), for example 1e-4")
        require(TAU_MIN <= self.temperature <= TAU_MAX, "temperature", f"it must be in [{TAU_MIN}, {TAU_MAX}]")
        require(0 <= self.tau_lr <= MOST, "tau_lr", f"it must be 0 or more, up to {MOST:g}")
        require_one_of("tau_lr_schedule", TAU_LR_SCHEDULES)
        require(
            not (self.individual_tau and self.tau_lr_schedule == "step_thresh"),
            "tau_lr_schedule",
            f"{self.loss} has a temperature per sample and no single one to compare; choose const or cosine",
        )
        require(0 <= self.beta1 < 1, "beta1", "it must be in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", "it must be in [0, 1)")
        require(self.adam_eps >= 0, "adam_eps", "it must be 0 or more")
        require(0 < self.lr < math.inf, "lr", "it must be above 0")
        require(0 <= self.lr_min <= self.lr, "lr_min", f"it must be between 0 and the learning rate {self.lr}")
        require_one_of("gradients", GRADIENTS)
        if self.products is not None:
            require_one_of("products", PRODUCTS)


# Fields that flags set and that a state keeps: every default that depends on the run is in force under its own name.
RESOLVED = (
    "gamma", "gamma_schedule", "gamma_decay_epochs", "rho", "eps", "temperature", "tau_lr", "tau_lr_schedule",
    "gradients", "products",
)  # fmt: skip

"""FastCLIPConfig: every setting of the algorithms, checked when it is made."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError

GLOBAL_TAU = ("fastclip-v0", "fastclip-v3")  # one temperature, learned
CONSTANT_TAU = ("sogclr", "fastclip-v1")  # one temperature, constant
INDIVIDUAL_TAU = ("isogclr", "fastclip-v2")  # one temperature per sample and modality, learned
CONSTANT_GAMMA = ("sogclr", "isogclr")  # by default
LOSSES = ("sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3")

TAU_MIN, TAU_MAX = 0.01, 1.0  # the range that OpenCLIP's clamp of logit_scale to [0, ln 100] allows
# The defaults, each written here alone: the flags' help and the documentation take them from here.
TEMPERATURE, INDIVIDUAL_TEMPERATURE = 0.07, 0.03
V3_TAU_LR_DIVISOR, INDIVIDUAL_TAU_LR = 5, 0.0133
GAMMA_FACTOR, GAMMA_POWER = 4.177, -0.7265
PUBLISHED_BATCH = 1024  # global batch of the runs whose rho was published
PUBLISHED_RHO = {"fastclip-v3": 6.5, "fastclip-v2": 7.0, "isogclr": 7.0}
LEAST_DEFAULT_RHO = 1.0
BY_LOSS: Any = None  # a field that __post_init__ fills with the default of the loss


def default_gamma(epochs: int) -> float:
    """Smallest gamma of the schedule for a run of `epochs`: the authors' later rule, a power of the epochs."""
    return min(1.0, GAMMA_FACTOR * math.pow(max(epochs, 1), GAMMA_POWER))


def default_rho(loss: str, global_batch_size: int) -> float:
    """The published rho, scaled by ln(B-1)/ln(1023) for a global batch of B pairs, and at least 1.

    One batch bounds the KL divergence that rho stands for by ln(B-1), so a small batch needs a smaller rho.
    Losses without rho get 0.
    """
    published = PUBLISHED_RHO.get(loss, 0.0)
    if not published:
        return 0.0
    share = math.log(max(global_batch_size - 1, 1)) / math.log(PUBLISHED_BATCH - 1)
    return max(LEAST_DEFAULT_RHO, published * share)


def default_gamma_decay_epochs(epochs: int) -> int:
    """Epochs until gamma is smallest: half of the epochs, the authors' advice."""
    return max(1, epochs // 2)


@dataclass(frozen=True)
class FastCLIPConfig:
    """Settings of one FastCLIP run (paper: arXiv 2407.01445). Left out, or None: the default, in brackets.

    Raises UserError (a ValueError) that names the field and the cure.
    """

    loss: str  # one of LOSSES
    num_samples: int  # N, rows of the per-sample table; ids are 0 .. N-1
    epochs: int = 32  # epochs of the whole run, the horizon of gamma's default
    gamma: float = BY_LOSS  # gamma_min in (0, 1] (default_gamma(epochs))
    gamma_schedule: str = BY_LOSS  # "cosine" or "constant" (constant for sogclr and isogclr, else cosine)
    gamma_decay_epochs: int = BY_LOSS  # E, epochs until gamma_min is reached (half of the epochs)
    rho: float = BY_LOSS  # margin of RGCL and RGCL-g, for v2, isogclr and v3 (the published value for B = 1024)
    eps: float = 1e-14  # added to u, in u's own unit
    temperature: float = BY_LOSS  # tau at the start (INDIVIDUAL_TEMPERATURE for v2 and isogclr, else TEMPERATURE)
    tau_lr: float = BY_LOSS  # learning rate of tau (a fifth of lr for v3, lr for v0, INDIVIDUAL_TAU_LR for v2, isogclr)
    tau_lr_schedule: str = BY_LOSS  # cosine, const or step_thresh (v3 step_thresh, v0 cosine, else const)
    beta1: float = 0.9  # of tau's AdamW (v0, v3) or Adam (v2, isogclr)
    beta2: float = 0.999
    adam_eps: float = 1e-8
    lr: float = 5e-4  # the model's peak learning rate, the unit of the cosine of tau_lr
    warmup_steps: int = 0  # linear warm-up of the cosine, in steps
    total_steps: int | None = None  # length of the cosine in steps; None: no decay after the warm-up
    lr_min: float = 0.0  # floor of the model's cosine; tau_lr's cosine has the same floor relative to its peak
    gradients: str = "released"  # "released": the published code's; "paper": the paper's formulas
    table_dtype: torch.dtype = torch.float32  # of the table and of tau; float64 in tests

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r} is unknown: choose one of {', '.join(LOSSES)}")
        tau_lr, schedule = 0.0, "const"
        if self.loss == "fastclip-v3":
            tau_lr, schedule = self.lr / V3_TAU_LR_DIVISOR, "step_thresh"
        elif self.loss == "fastclip-v0":
            tau_lr, schedule = self.lr, "cosine"
        elif self.individual_tau:
            tau_lr = INDIVIDUAL_TAU_LR
        defaults = {
            "gamma": default_gamma(self.epochs),
            "gamma_schedule": "constant" if self.loss in CONSTANT_GAMMA else "cosine",
            "gamma_decay_epochs": default_gamma_decay_epochs(self.epochs),
            "rho": default_rho(self.loss, PUBLISHED_BATCH),
            "temperature": INDIVIDUAL_TEMPERATURE if self.individual_tau else TEMPERATURE,
            "tau_lr": tau_lr,
            "tau_lr_schedule": schedule,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check()

    def resolved(self) -> dict[str, float | int | str]:
        """The plain values that a resumed run must not derive anew, by the names of their fields (RESOLVED)."""
        return {name: getattr(self, name) for name in RESOLVED}

    @property
    def individual_tau(self) -> bool:
        """Whether every sample has temperatures of its own (v2, isogclr)."""
        return self.loss in INDIVIDUAL_TAU

    @property
    def global_tau(self) -> bool:
        """Whether one temperature is learned (v0, v3)."""
        return self.loss in GLOBAL_TAU

    def _check(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}: {rule}")

        require(self.num_samples >= 1, "num_samples", "the data set needs at least one sample")
        require(0 < self.gamma <= 1, "gamma", "it must be in (0, 1]; 1 switches the memory of u off")
        require(self.gamma_schedule in ("cosine", "constant"), "gamma_schedule", "choose cosine or constant")
        require(self.gamma_decay_epochs >= 1, "gamma_decay_epochs", "it must be 1 epoch or more")
        require(0 <= self.rho < math.inf, "rho", "it must be 0 or more")
        require(0 < self.eps < 1, "eps", "it must be in (0, 1), for example 1e-14")
        require(TAU_MIN <= self.temperature <= TAU_MAX, "temperature", f"it must be in [{TAU_MIN}, {TAU_MAX}]")
        require(0 <= self.tau_lr < math.inf, "tau_lr", "it must be 0 or more")
        require(
            self.tau_lr_schedule in ("cosine", "const", "step_thresh"),
            "tau_lr_schedule",
            "choose cosine, const or step_thresh",
        )
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
        require(self.gradients in ("released", "paper"), "gradients", "choose released or paper")


# Fields that flags set and that a state keeps: every default that depends on the run is in force under its own name.
RESOLVED = (
    "gamma", "gamma_schedule", "gamma_decay_epochs", "rho", "eps", "temperature", "tau_lr", "tau_lr_schedule",
    "gradients",
)  # fmt: skip

"""FastCLIPConfig: every setting of the algorithms, checked when it is made."""

import math
from dataclasses import dataclass

import torch

from ..errors import UserError

GLOBAL_TAU = ("fastclip-v0", "fastclip-v3")  # one temperature, learned
CONSTANT_TAU = ("sogclr", "fastclip-v1")  # one temperature, constant
INDIVIDUAL_TAU = ("isogclr", "fastclip-v2")  # one temperature per sample and modality, learned
LOSSES = ("sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3")

TAU_MIN, TAU_MAX = 0.01, 1.0  # the range that OpenCLIP's clamp of logit_scale to [0, ln 100] allows
PUBLISHED_BATCH = 1024  # global batch of the runs whose rho was published
PUBLISHED_RHO = {"fastclip-v3": 6.5, "fastclip-v2": 7.0, "isogclr": 7.0}


def default_gamma(epochs: int) -> float:
    """Smallest gamma of the schedule for a run of `epochs`: the authors' later rule, min(1, 4.177 * epochs^-0.7265)."""
    return min(1.0, 4.177 * max(epochs, 1) ** -0.7265)


def default_rho(loss: str, global_batch_size: int) -> float:
    """The published rho, scaled by ln(B-1)/ln(1023) for a global batch of B pairs, and at least 1.

    One batch bounds the KL divergence that rho stands for by ln(B-1), so a small batch needs a smaller rho.
    Losses without rho get 0.
    """
    published = PUBLISHED_RHO.get(loss, 0.0)
    if not published:
        return 0.0
    return max(1.0, published * math.log(max(global_batch_size - 1, 1)) / math.log(PUBLISHED_BATCH - 1))


@dataclass(frozen=True)
class FastCLIPConfig:
    """Settings of one FastCLIP run (paper: arXiv 2407.01445). None means: the default of the loss.

    Raises UserError (a ValueError) that names the field and the cure.
    """

    loss: str  # one of LOSSES
    num_samples: int  # N, rows of the per-sample table; ids are 0 .. N-1
    epochs: int = 32  # epochs of the whole run, the horizon of gamma's default
    gamma: float | None = None  # gamma_min in (0, 1]; None: default_gamma(epochs)
    gamma_schedule: str | None = None  # "cosine" or "constant"; None: constant for sogclr and isogclr, else cosine
    gamma_decay_epochs: int | None = None  # E, epochs until gamma_min is reached; None: half of the epochs
    rho: float | None = None  # margin of RGCL and RGCL-g (v2, isogclr, v3); None: the published value for B = 1024
    eps: float = 1e-14  # added to u, in u's own unit
    temperature: float | None = None  # tau at the start; None: 0.03 for v2 and isogclr, else 0.07
    tau_lr: float | None = None  # learning rate of tau; None: lr/5 (v3), lr (v0), 0.0133 (v2, isogclr)
    tau_lr_schedule: str | None = None  # cosine, const or step_thresh; None: v3 step_thresh, v0 cosine, else const
    beta1: float = 0.9  # of tau's AdamW (v0, v3) or Adam (v2, isogclr)
    beta2: float = 0.999
    adam_eps: float = 1e-8
    lr: float = 5e-4  # the model's peak learning rate, the unit of the cosine of tau_lr
    warmup_steps: int = 0  # linear warm-up of the cosine, in steps
    total_steps: int | None = None  # length of the cosine in steps; None: no decay after the warm-up
    lr_min: float = 0.0  # floor of the model's cosine; tau_lr's cosine has the same floor relative to its peak
    gradients: str = "released"  # "released": the published code's; "paper": the paper's formulas
    table_dtype: torch.dtype = torch.float32  # of the table and of tau; float64 in tests

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r} is unknown: choose one of {', '.join(LOSSES)}")
        tau_lr, schedule = 0.0, "const"
        if self.loss == "fastclip-v3":
            tau_lr, schedule = self.lr / 5, "step_thresh"
        elif self.loss == "fastclip-v0":
            tau_lr, schedule = self.lr, "cosine"
        elif self.individual_tau:
            tau_lr = 0.0133
        defaults = {
            "gamma": default_gamma(self.epochs),
            "gamma_schedule": "constant" if self.loss in ("sogclr", "isogclr") else "cosine",
            "gamma_decay_epochs": max(1, self.epochs // 2),
            "rho": default_rho(self.loss, PUBLISHED_BATCH),
            "temperature": 0.03 if self.individual_tau else 0.07,
            "tau_lr": tau_lr,
            "tau_lr_schedule": schedule,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check()

    @property
    def individual_tau(self) -> bool:
        """Whether every sample has temperatures of its own (v2, isogclr)."""
        return self.loss in INDIVIDUAL_TAU

    @property
    def global_tau(self) -> bool:
        """Whether one temperature is learned (v0, v3)."""
        return self.loss in GLOBAL_TAU

    def _check(self):
        def require(ok, name, rule):
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

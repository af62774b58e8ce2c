"""Spellings and defaults of the code that FastCLIP's authors released: all of them, and nowhere else.

The published commands run with only the script's name changed.
"""

from ..errors import UserError
from ..training.profiling import FOLDER, STEPS, TRACED
from .flags import Flag

# Our flag: the same flag in the released code.
SPELLINGS = {
    "--fastclip-gamma": "--gamma",
    "--fastclip-gamma-schedule": "--gamma_schedule",
    "--fastclip-gamma-decay-epochs": "--gamma_decay_epochs",
    "--fastclip-rho": "--rho",
    "--fastclip-eps": "--fastclip_eps",
    "--fastclip-temperature": "--temperature",
    "--fastclip-tau-lr": "--lr_tau",
    "--fastclip-tau-lr-schedule": "--lr_tau_scheduler",
    "--data-size": "--data_size",
    "--lr-min": "--lr_min",
    "--stop-epochs": "--stop_epochs",
}

# What --fastclip implies for every setting that is not given; the names are fields of FastCLIPConfig.
DEFAULTS = {
    "gamma": 0.8,
    "gamma_schedule": "cosine",
    "gamma_decay_epochs": 10,
    "rho": 8.0,
    "eps": 1e-14,
    "temperature": 0.07,
    "tau_lr": -1.0,  # the model's learning rate
    "tau_lr_schedule": "cosine",
}

DEFAULT_SCHEME = "global_learnable"
# --temperature_scheme: the losses it can stand for.
SCHEMES = {
    "global_learnable": {"plain": "fastclip-v0", "multiply_tau": "fastclip-v3"},
    "global_constant": {"plain": "fastclip-v1", "constant gamma": "sogclr"},
    "individual_learnable": {"plain": "fastclip-v2", "constant gamma": "isogclr"},
}

OPTIMIZERS = {"adamw": "adamw", "lamb": "timm/lamb"}  # --optimizer: the same in --opt

# The released flags without a counterpart.
FLAGS = (
    Flag(
        "--fastclip",
        "Take the loss from --temperature_scheme, --multiply_tau and --gamma_schedule as the released code does, and "
        f"its defaults: gamma {DEFAULTS['gamma']} ({DEFAULTS['gamma_schedule']}, {DEFAULTS['gamma_decay_epochs']} "
        f"epochs), rho {DEFAULTS['rho']}, tau_lr = --lr with a {DEFAULTS['tau_lr_schedule']}, temperature "
        f"{DEFAULTS['temperature']}, eps {DEFAULTS['eps']}.",
        {"action": "store_true", "dest": "released"},
    ),
    Flag(
        "--temperature_scheme",
        "With --fastclip. global_learnable: fastclip-v0, with --multiply_tau fastclip-v3; global_constant: "
        "fastclip-v1; individual_learnable: fastclip-v2; the last two with --gamma_schedule constant: sogclr, isogclr.",
        {"choices": list(SCHEMES)},
        default=DEFAULT_SCHEME,
    ),
    Flag(
        "--multiply_tau",
        "With --fastclip and global_learnable: the objective has the factor tau (fastclip-v3).",
        {"action": "store_true"},
    ),
    Flag(
        "--optimizer",
        "adamw is --opt adamw, lamb is --opt timm/lamb.",
        {"choices": list(OPTIMIZERS)},
        default="what --opt says",
    ),
    Flag(
        "--profile",
        f"Trace {TRACED} steps, after {STEPS - TRACED} of the first epoch, to {FOLDER}/rank-NNNNN.json.gz in the run's "
        "folder, with every loss; python -m benchmarks.step_time RUN shows where their time goes.",
        {"action": "store_true"},
    ),
)


def loss_named_by(scheme: str | None, multiply_tau: bool, gamma_schedule: str | None) -> str:
    """Name of the loss that the released flags stand for; None means that the flag was not given.

    Raises UserError for --multiply_tau with a temperature that is not global and learned.
    """
    scheme = scheme or DEFAULT_SCHEME
    losses = SCHEMES[scheme]
    if multiply_tau and "multiply_tau" not in losses:
        raise UserError(
            f"--multiply_tau has no meaning with --temperature_scheme {scheme}: leave it out, or write "
            "--temperature_scheme global_learnable for FastCLIP-v3"
        )
    if multiply_tau:
        return losses["multiply_tau"]
    if gamma_schedule == "constant":
        return losses.get("constant gamma", losses["plain"])
    return losses["plain"]

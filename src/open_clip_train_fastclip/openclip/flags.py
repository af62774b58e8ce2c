"""FastCLIP's flags, as a table: what they are called, what they take, what --help and docs/flags.md say about them.

Defaults are taken from where they are used, so each is written once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..loss import config
from ..loss.config import ALGORITHMS, CONSTANT, GLOBAL, INDIVIDUAL, LOSSES, Algorithm, FastCLIPConfig, losses_with
from ..loss.precision import default_products
from ..loss.temperature import STEP_FACTOR, STEP_THRESHOLD


@dataclass(frozen=True)
class Flag:
    """One flag. Its default, in words, is that of `options` unless it depends on others."""

    name: str
    meaning: str
    options: dict[str, Any] = field(default_factory=dict)  # for argparse, without help
    default: str = ""
    sets: str = ""  # the field of FastCLIPConfig; a flag that is not given leaves it None

    @property
    def default_text(self) -> str:
        """The default in words."""
        value = self.options.get("default", "off")
        return self.default or (f"{value:g}" if isinstance(value, float) else str(value))

    @property
    def help(self) -> str:
        """What --help says."""
        return f"{self.meaning} Default: {self.default_text}."


def _by_loss(value: Callable[[Algorithm], str]) -> str:
    """A default that depends on the loss, in words; losses for which the value is empty do not count."""
    losses: dict[str, list[str]] = {}
    for loss, algorithm in ALGORITHMS.items():
        if value(algorithm):
            losses.setdefault(value(algorithm), []).append(loss)
    *others, usual = sorted(losses, key=lambda text: len(losses[text]))
    return ", ".join([*(f"{text} for {' and '.join(losses[text])}" for text in others), f"else {usual}"])


def _tau_lr(algorithm: Algorithm) -> str:
    if algorithm.tau_lr_divisor:
        return "--lr" if algorithm.tau_lr_divisor == 1 else f"--lr / {algorithm.tau_lr_divisor}"
    return str(algorithm.tau_lr or "")


FLAGS = (
    Flag(
        "--loss",
        "clip and siglip: OpenCLIP's own losses, unchanged. "
        f"{', '.join(losses_with(CONSTANT))}: one constant temperature; "
        f"{', '.join(losses_with(GLOBAL))}: one learned temperature; "
        f"{', '.join(losses_with(INDIVIDUAL))}: one learned temperature per sample.",
        {"choices": ["clip", "siglip", *LOSSES]},
        default="clip",
    ),
    Flag(
        "--fastclip-gamma",
        "Smallest weight of the new estimate in the per-sample average u, in (0, 1]; 1: no memory.",
        {"type": float},
        default=f"min(1, {config.GAMMA_FACTOR} * V^{config.GAMMA_POWER}) where a sample is seen V times in all, "
        f"{config.default_gamma(37):.2g} at 37 epochs of the whole data",
        sets="gamma",
    ),
    Flag(
        "--fastclip-gamma-schedule",
        "How gamma falls from 1 in the first epoch: along a cosine, or at once from the second epoch on.",
        {"choices": list(config.GAMMA_SCHEDULES)},
        default=_by_loss(lambda algorithm: algorithm.gamma_schedule),
        sets="gamma_schedule",
    ),
    Flag(
        "--fastclip-gamma-decay-epochs",
        "Epochs until the cosine of gamma reaches --fastclip-gamma.",
        {"type": int},
        default="half of --epochs",
        sets="gamma_decay_epochs",
    ),
    Flag(
        "--fastclip-rho",
        "Margin of the robust losses, 0 or more: a larger rho gives a smaller temperature.",
        {"type": float},
        default=_by_loss(lambda algorithm: str(algorithm.rho or ""))
        + f", times ln(B-1)/ln({config.PUBLISHED_BATCH - 1}) for a global batch of B pairs, at least "
        f"{config.LEAST_DEFAULT_RHO:g}",
        sets="rho",
    ),
    Flag(
        "--fastclip-eps",
        "Weight of an anchor's own pair beside u in its denominator, in the unit of u, in (0, 1): an anchor whose u is "
        "far below it fades, as in OpenCLIP's loss at a global batch of 1 + 1/eps pairs.",
        {"type": float},
        default=_by_loss(lambda algorithm: f"{algorithm.eps:g}"),
        sets="eps",
    ),
    Flag(
        "--fastclip-temperature",
        f"Temperature tau at the start, in [{config.TAU_MIN:g}, {config.TAU_MAX:g}] (the logit scale is 1/tau). With "
        "--loss clip: OpenCLIP's own start.",
        {"type": float},
        default=_by_loss(lambda algorithm: str(algorithm.temperature)),
        sets="temperature",
    ),
    Flag(
        "--fastclip-tau-lr",
        "Learning rate of the temperature, per step; -1: --lr.",
        {"type": float},
        default=_by_loss(_tau_lr),
        sets="tau_lr",
    ),
    Flag(
        "--fastclip-tau-lr-schedule",
        "cosine: warm-up and cosine like the model's rate; const; step_thresh: times "
        f"{STEP_FACTOR:.2g} while tau <= {STEP_THRESHOLD}.",
        {"choices": list(config.TAU_LR_SCHEDULES)},
        default=_by_loss(lambda algorithm: algorithm.tau_lr_schedule),
        sets="tau_lr_schedule",
    ),
    Flag(
        "--fastclip-gradients",
        "Gradients of the released code, which made the published numbers, or of the paper's formulas.",
        {"choices": list(config.GRADIENTS)},
        default=FastCLIPConfig.gradients,
        sets="gradients",
    ),
    Flag(
        "--fastclip-products",
        "Precision of the loss's matrix products: exact: float32; tf32-gradient: TF32 in those of the gradients, which "
        "leaves u and tau exact; tf32: TF32 in all.",
        {"choices": list(config.PRODUCTS)},
        default=f"{default_products('cuda')} on a GPU, else {default_products('cpu')}",
        sets="products",
    ),
    Flag(
        "--fastclip-fresh-state",
        "With --resume FILE: take only the model's weights from it; the rest starts anew at epoch 0.",
        {"action": "store_true"},
    ),
    Flag(
        "--save-every",
        "Save inside an epoch as well, as checkpoints/epoch_E_step_I/: every so many steps or so much time, such as "
        "1000steps, 30min or 2h. With --loss clip and siglip this also seeds the data.",
        {"metavar": "INTERVAL"},
        default="only before a FastCLIP run ends because of SIGUSR1 or SIGTERM",
    ),
    Flag("--keep", "How many of the newest checkpoints/epoch_E_step_I/ stay.", {"type": int, "default": 2}),
    Flag(
        "--save-async",
        "Train on while what --save-every saves is written, from a copy in the CPU's memory.",
        {"action": "store_true"},
    ),
    Flag(
        "--sample-id",
        "Number of a sample for FastCLIP: its position in the data, or the number under 'key' in its json.",
        {"choices": ["position", "json-key"], "default": "position"},
    ),
    Flag(
        "--samples-per-shard",
        "Most samples that a shard holds, for remote shards without sizes.json.",
        {"type": int},
        default="read from the data",
    ),
    Flag(
        "--data-size",
        "Samples in the per-sample table, above the largest key: needed with --sample-id json-key, ignored with "
        "position; -1: not given.",
        {"type": int},
        default="-1",
    ),
    Flag(
        "--max-unusable",
        "Share of an epoch's samples, from 0 to 1, that may be without a usable image or caption: more of them end the "
        "run.",
        {"type": float, "default": 0.05},
    ),
    Flag(
        "--skip-broken-shards",
        "Leave out local shards that are missing, cut off or damaged, with a warning, instead of refusing them.",
        {"action": "store_true"},
    ),
    Flag(
        "--lr-min",
        "Floor of the cosine of the learning rate, from 0 to --lr.",
        {"type": float, "default": FastCLIPConfig.lr_min},
    ),
    Flag(
        "--stop-epochs",
        "Stop when this many epochs are done; all schedules keep the horizon of --epochs; resume to go on; -1: do not "
        "stop early.",
        {"type": int},
        default="-1",
    ),
    Flag(
        "--freeze-temperature",
        "With --loss clip: keep the temperature constant, at --temperature.",
        {"action": "store_true"},
    ),
    Flag(
        "--grad-compression",
        "Compress the all-reduce of the parameters' gradients, for slow networks, with every loss: bf16 halves the "
        "bytes.",
        {"choices": ["none", "bf16"], "default": "none"},
    ),
    Flag(
        "--dist-timeout",
        "Seconds after which a rank that waits for another in training gives up with an error.",
        {"type": float, "default": 1800.0},
    ),
)

CONFIG_FLAGS = {flag.sets: flag.name for flag in FLAGS if flag.sets}  # field of FastCLIPConfig: the flag that sets it

"""Which optimizer?"""

from dataclasses import replace

from . import Table
from .settings import V3

# At scale tiny the rate of each optimizer is the best of three on the tuning pairs. The published rates of LAMB, Lion
# and SGD were not found: at the larger scales they are AdamW's times the usual factor, to be tuned.
GRID = {"lamb": (2e-3, 5e-3, 1e-2), "lion": (5e-5, 1e-4, 2e-4), "sgd": (0.3, 1.0, 3.0)}
CHOSEN = {"lamb": 5e-3, "lion": 1e-4, "sgd": 1.0}
LABELS = {"lamb": "LAMB", "lion": "Lion", "sgd": "SGD, momentum 0.9"}
OPTIONS = {
    "lamb": {},
    "lion": {"--beta1": 0.9, "--beta2": 0.99},
    "sgd": {"--momentum": 0.9},
}


def with_optimizer(optimizer, lr, **changes):
    """fastclip-v3 with an optimizer of timm and its learning rate at scale tiny."""
    flags = {"--opt": f"timm/{optimizer}"} | OPTIONS[optimizer]
    # tau has an optimizer of its own, AdamW, whose rate would follow --lr at the larger scales
    return replace(V3, flags=flags, tiny=V3.tiny | {"--lr": lr}, curve=False, seeds=1, **changes)


TABLE = Table(
    "Optimizers",
    "fastclip-v3 with AdamW and with LAMB, Lion and SGD with momentum of timm; one seed, three learning rates each.",
    (
        replace(V3, label="AdamW"),
        *(with_optimizer(name, lr, name=f"v3-{name}", label=LABELS[name]) for name, lr in CHOSEN.items()),
    ),
    scales=("tiny", "medium", "large"),
)

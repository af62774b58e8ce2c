"""Which optimizer?"""

from dataclasses import replace

from ..experiments.table import Table
from .settings import V3

# At scale tiny the rate of each optimizer is the best of these on the tuning pairs; LAMB had two more than the others
# since its first three lay too high. SGD multiplies the weight decay by its large rate, so AdamW's 0.1 would shrink the
# weights to nothing.
GRID = {"lamb": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2), "lion": (5e-5, 1e-4, 2e-4), "sgd": (0.03, 0.1, 0.3)}
CHOSEN = {"lamb": 1e-3, "lion": 2e-4, "sgd": 0.1}
LABELS = {"lamb": "LAMB", "lion": "Lion", "sgd": "SGD, momentum 0.9"}
OPTIONS = {
    "lamb": {},
    "lion": {"--beta1": 0.9, "--beta2": 0.99},
    "sgd": {"--momentum": 0.9, "--wd": 1e-4},
}


def with_optimizer(optimizer, lr, **changes):
    """fastclip-v3 with an optimizer of timm and its learning rate at scale tiny.

    The published rates were not found. At the larger scales the rate is twice that of scale tiny, as AdamW's of
    CC3M's recipe is, and is to be tuned. tau is moved by AdamW whatever the optimizer, with the recipe's rate for it.
    """
    flags = {"--opt": f"timm/{optimizer}"} | OPTIONS[optimizer]
    return replace(
        V3, flags=flags, local=V3.local | {"--lr": lr}, larger={"--lr": 2 * lr}, curve=False, seeds=1, **changes,
    )  # fmt: skip


TABLE = Table(
    "Optimizers",
    "fastclip-v3 with AdamW and with LAMB, Lion and SGD with momentum of timm; one seed, three to five learning rates.",
    (
        replace(V3, label="AdamW"),
        *(with_optimizer(name, lr, name=f"v3-{name}", label=LABELS[name]) for name, lr in CHOSEN.items()),
    ),
    scales=("tiny", "medium", "large"),
    notes="AdamW has three seeds, of which that of the others has 20.2. LAMB is level with AdamW; Lion, whose "
    "best rate is the largest that was tried, and SGD are behind. SGD with AdamW's weight decay of 0.1 ended at "
    "chance at rates of 0.3, 1 and 3 (in runs.jsonl).",
)

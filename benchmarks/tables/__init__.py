"""The tables of the benchmarks: one file each, which says what is compared. The file's name is the table's."""

import importlib

from open_clip_train_fastclip.errors import UserError

from ..experiments.table import Table

NAMES = (
    "gamma_schedule", "temperature", "optimizers", "scaling", "step_time", "laion400m", "gradients", "memory",
    "map", "map_defaults", "tuning", "tuning_optimizers", "eps",
    "real_tuning", "real", "real_gamma", "real_batch", "real_epochs", "real_size", "real_gpu",
)  # fmt: skip
QUICK_NAMES = NAMES[:8]  # of run --quick all: those that answer a question of the paper's
KNOWN = (*NAMES, "quickstart")  # which benchmarks.quickstart runs and shows: it is in no report, nor in run all


def load(name: str) -> Table:
    """The table of that name. Raises UserError for another name than those of KNOWN."""
    if name not in KNOWN:
        raise UserError(f"there is no table {name}: take one of {', '.join(KNOWN)}, or all")
    return importlib.import_module(f"{__name__}.{name}").TABLE

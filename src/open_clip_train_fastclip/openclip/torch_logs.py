"""torch's own loggers, which OpenCLIP lets speak: the statistics of 32 ranks would bury a run's last lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_log_levels_kept() -> Iterator[None]:
    """Put back what level torch's loggers have (TORCH_LOGS sets it), or WARNING, after OpenCLIP has set that of all."""
    names = ["torch", *(name for name in logging.root.manager.loggerDict if name.startswith("torch."))]
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level or (logging.WARNING if name == "torch" else logging.NOTSET))

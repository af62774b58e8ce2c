"""Around OpenCLIP's setting up of its loggers: what is logged before, and torch's own loggers after it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


class EarlyLog(MemoryHandler):
    """Keeps what is logged until OpenCLIP has set up its logging, which it comes before in out.log.

    Without a handler logging would make one of its own, and every later line would appear twice.
    """

    def __init__(self) -> None:
        super().__init__(capacity=1 << 20, flushLevel=logging.CRITICAL + 1)
        logging.root.addHandler(self)

    def hand_on(self) -> None:
        """To the handlers that there are now or, if none were set up, to standard error."""
        logging.root.removeHandler(self)
        records, self.buffer = self.buffer, []
        for record in records:
            (logging.root if logging.root.handlers else logging.lastResort or self).handle(record)


@contextmanager
def torch_log_levels_kept() -> Iterator[None]:
    """Put back what level torch's loggers have (TORCH_LOGS sets it), or WARNING, after OpenCLIP has set that of all.

    At INFO the statistics of 32 ranks would bury a run's last lines.
    """
    names = ["torch", *(name for name in logging.root.manager.loggerDict if name.startswith("torch."))]
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level or (logging.WARNING if name == "torch" else logging.NOTSET))

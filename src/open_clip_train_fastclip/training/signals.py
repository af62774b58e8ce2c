"""SIGUSR1 and SIGTERM ask a run to save and to end; they are noted, and looked at between two steps."""

import signal

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


class Stopped(Exception):
    """The run was asked to end, has saved, and is to be started again; the text says what came and where it saved."""


class StopSignals:
    """Which signal has come first, if any; later ones are ignored, also while the run saves."""

    def __init__(self):
        self.received: str | None = None
        self._before: dict = {}

    def watch(self) -> None:
        """Note the signals from now on instead of dying of them."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def unwatch(self) -> None:
        """Let the signals do what they did before watch()."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame) -> None:
        self.received = self.received or signal.Signals(number).name


def ignore_signals(worker: int = 0) -> None:
    """As worker_init_fn of a DataLoader: a signal to all processes of a run is for the main ones alone.

    Such a worker does not end when it is terminated: main.console() kills it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

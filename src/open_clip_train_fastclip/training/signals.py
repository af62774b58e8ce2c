"""Signals that ask a run to save and to end; they are noted, and looked at between two steps."""

import os
import signal
import sys
from types import FrameType
from typing import Any

# A batch system's, an operator's, Ctrl-C's, and a terminal's that is closed.
PREEMPTION_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IGNORED_STAYS = (signal.SIGINT, signal.SIGHUP)  # nohup and shells in the background ask for that
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


class Preempted(Exception):
    """The run was asked to end, has saved, and is to be started again; the text says what came and where it saved."""


class PreemptionSignals:
    """Which signal has come first, if any; later ones are ignored, also in a save, but for a second Ctrl-C."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def watch(self) -> None:
        """Note the signals from now on instead of dying of them."""
        for number in PREEMPTION_SIGNALS:
            if number not in IGNORED_STAYS or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def unwatch(self) -> None:
        """Let the signals do what they did before watch()."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process at once
        if number == signal.SIGHUP:
            _leave_terminal()


def _leave_terminal() -> None:
    """What is written to a terminal that is closed raises an error, in the bar's thread as well."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def ignore_signals(worker: int = 0) -> None:
    """As worker_init_fn of a DataLoader: a signal to all processes of a run is for the main ones alone.

    Such a worker does not end when it is terminated: main.console() kills it.
    """
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

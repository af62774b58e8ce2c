"""When a run saves or ends inside an epoch: decided between two steps, by all ranks in the same way."""

import re
import time
from dataclasses import dataclass

import torch.distributed as dist

from ..errors import UserError
from ..ranks import Question, is_first_rank
from .progress import Progress
from .signals import PreemptionSignals

SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Interval:
    """What --save-every says; one of the two is None, or both if nothing is saved on the way."""

    steps: int | None = None
    seconds: float | None = None


def parse_interval(text: str) -> Interval:
    """Interval of "1000steps", "45s", "30min" or "2h". Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(steps?|s|min|h)", text)
    number = float(match[1]) if match else 0.0
    steps = match is not None and match[2].startswith("step")
    if match is None or not number or (steps and not number.is_integer()):
        raise UserError(f"--save-every {text}: write a number with its unit: 1000steps, 30min, 2h or 45s")
    return Interval(steps=int(number)) if steps else Interval(seconds=number * SECONDS[match[2]])


@dataclass(frozen=True)
class Decision:
    """What all ranks do now."""

    stop: bool  # save and end
    save: bool  # by --save-every
    written: bool  # every rank had written its part of the running save


class SaveTrigger:
    """Asks every rank between two steps whether a signal has come, rank 0 whether the time of --save-every is over.

    The question goes over `group` (of ranks.gloo_group(); None: alone) at one boundary and is read at the next, so that
    no host waits for a device or a slow neighbour. Steps of --save-every all ranks count alike.
    """

    def __init__(
        self, interval: Interval, signals: PreemptionSignals, group: dist.ProcessGroup | None, start: Progress
    ):
        """start: where the run begins or goes on."""
        self.interval, self.signals, self.group = interval, signals, group
        self._last_time = time.monotonic()
        self.last_step = start.global_step  # of the run when it was saved last, or began
        self._question: Question | None = None

    def decide(self, progress: Progress, written: bool) -> Decision:
        """The decision at this boundary (collective, with ask() after it); written: by this rank."""
        if self.group is None:
            stop, due, unwritten = self._own(written)
        elif self._question is None:
            stop, due, unwritten = False, False, True
        else:
            stop, due, unwritten = map(bool, self._question.answers())
        return Decision(stop, due or self._due_by_steps(progress.global_step), not unwritten)

    def ask(self, written: bool) -> None:
        """Launch the question that the next decide() reads, once the decision of this boundary is carried out."""
        if self.group is not None:
            self._question = Question(self._own(written), self.group)

    def settle(self) -> None:
        """Wait for the answers to the question under way, if there is one."""
        if self._question is not None:
            self._question.wait()

    def saving(self, progress: Progress) -> None:
        """A save begins: the next one is due an interval later."""
        self._last_time, self.last_step = time.monotonic(), progress.global_step

    def _own(self, written: bool) -> tuple[bool, bool, bool]:
        seconds = self.interval.seconds if is_first_rank() else None
        due = seconds is not None and time.monotonic() - self._last_time >= seconds
        return self.signals.received is not None, due, not written

    def _due_by_steps(self, step: int) -> bool:
        every = self.interval.steps
        return every is not None and step // every > self.last_step // every

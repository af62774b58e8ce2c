"""SIGUSR1 and --resume latest through main(): exit codes, the time of the save, and the curve of an undisturbed run."""

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import open_clip_train.data

from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.training.signals import EXIT_PREEMPTED

from ..harness.training_steps import ReadySamples
from .command_line import flags
from .measurement import Settings, row

STEPS, LOG_EVERY, INTERRUPTED_AFTER = 60, 5, 10
BATCH = {True: 8, False: 64}  # small or not
TOLERANCE = 1e-3  # of a value that the log gives
VALUE = re.compile(r"Train Epoch: 0 \[\s*(\d+)/.*?Contrastive_loss: ([\d.]+)")
REACHED = re.compile(r"FastCLIP Epoch: 0 step: (\d+)")
LAST_CHARACTERS = 600  # of a log that explains a failure


def rows(settings: Settings) -> Iterator[dict]:
    """One row for the save, one for the run that goes on."""
    batch = BATCH[settings.small]
    case = {"loss": "fastclip-v3", "model": "ViT-Glyph-32", "batch": batch, "steps": STEPS}
    with tempfile.TemporaryDirectory(prefix="gpu-resume-") as folder:
        argv = flags(settings, "ViT-Glyph-32", batch, STEPS, 1, "fastclip-v3")
        argv += ["--log-every-n-steps", str(LOG_EVERY), "--logs", folder]
        undisturbed = Command([*argv, "--name", "undisturbed"], Path(folder, "undisturbed.txt"))
        code_undisturbed = undisturbed.ended()

        interrupted = Command([*argv, "--name", "interrupted"], Path(folder, "interrupted.txt"))
        interrupted.wait_for_step(INTERRUPTED_AFTER)
        asked = time.monotonic()
        interrupted.signal(signal.SIGUSR1)
        code = interrupted.ended()
        seconds = time.monotonic() - asked
        saved = sorted(path.name for path in Path(folder, "interrupted", "checkpoints").glob("epoch_*_step_*"))
        figures = {"exit_code": code, "until_saved_and_ended_s": round(seconds, 3), "saved": saved}
        ok = code == EXIT_PREEMPTED and len(saved) == 1
        yield row("SIGUSR1", case, figures | ({} if ok else {"log": interrupted.text()[-LAST_CHARACTERS:]}), ok)

        resumed = Command([*argv, "--name", "interrupted", "--resume", "latest"], Path(folder, "resumed.txt"))
        code = resumed.ended()
        expected, found = undisturbed.curve(), interrupted.curve() | resumed.curve()
        off = max((abs(found[at] / value - 1) for at, value in expected.items() if at in found), default=None)
        ok = code == code_undisturbed == 0 and list(found) == list(expected) and off is not None and off <= TOLERANCE
        figures = {"exit_code": code, "log_lines": len(resumed.curve()), "largest_relative_difference": off}
        log = {} if ok else {"log": resumed.text()[-LAST_CHARACTERS:], "curve": found, "undisturbed": expected}
        yield row("--resume latest", case, figures | log, ok)


class Command:
    """The command line in a fork, with what it writes in a file."""

    def __init__(self, argv: list[str], log: Path):
        self.log = log
        log.touch()
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(argv,))
        self.process.start()

    def _run(self, argv: list[str]) -> None:
        descriptor = os.open(self.log, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        # random pictures in place of OpenCLIP's one: all pairs alike have nothing to learn from
        with patch.object(open_clip_train.data, "SyntheticDataset", ReadySamples):
            sys.exit(main(argv))

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Until it has logged that step, or has ended."""
        while self.process.is_alive() and not any(int(n) >= step for n in REACHED.findall(self.text())):
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def ended(self) -> int | None:
        """Its exit code, once it has ended; the part's time limit is its own."""
        self.process.join()
        return self.process.exitcode

    def curve(self) -> dict[int, float]:
        """Value of the loss by the number of samples done."""
        return {int(done): float(value) for done, value in VALUE.findall(self.text())}

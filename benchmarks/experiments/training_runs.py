"""Runs of the training command line: several at a time, their progress, and what is kept of a finished one."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from open_clip_train_fastclip.errors import UserError

from .run_log import last_line, read_log, read_results, samples_done

MODULE = "open_clip_train_fastclip.main"


@dataclass
class Run:
    """One training run. Beside its folder lie NAME.json (command, data, outcome) and NAME.log (its whole output)."""

    name: str
    logs: Path
    arguments: list[str]  # of the training command line
    data: str  # hash of the data
    batch: int  # pairs a step
    steps: int  # over all epochs
    epochs: int
    ranks: int = 1
    record: dict = field(default_factory=dict)
    process: subprocess.Popen | None = None
    started: float = 0.0

    @property
    def folder(self) -> Path:
        """Where the training command line writes."""
        return self.logs / self.name

    @property
    def command(self) -> list[str]:
        """The ordinary command line, after the interpreter."""
        if self.ranks == 1:
            return ["-m", MODULE, *self.arguments]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        return [*torchrun, "-m", MODULE, "--", *self.arguments]

    @property
    def error(self) -> str | None:
        """Why the run failed: the last line of its output. None if it did not."""
        return None if self.record.get("exit_code") == 0 else last_line(self._output.read_text(errors="replace"))

    @property
    def _output(self) -> Path:
        return self.logs / f"{self.name}.log"

    @property
    def _record_file(self) -> Path:
        return self.logs / f"{self.name}.json"

    def is_done(self) -> bool:
        """Whether this very command has been run to its end on this very data."""
        if not self._record_file.is_file():
            return False
        record = json.loads(self._record_file.read_text())
        same = record["arguments"] == self.arguments and record["data"] == self.data and record["exit_code"] == 0
        if not same or not self.folder.is_dir():
            return False
        self.record = record
        return True

    def start(self) -> None:
        """Starts the process. An older run of the same name is removed; UserError if that is not one of ours."""
        if self.folder.exists() and not self._record_file.is_file():
            raise UserError(f"{self.folder} exists and is no run of this command: move it away")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        self._write_record(exit_code=None, minutes=None)
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.started = time.monotonic()

    def has_ended(self) -> bool:
        """Whether the process is over; its outcome is then on record."""
        code = self.process.poll()
        if code is not None:
            self._write_record(exit_code=code, minutes=round((time.monotonic() - self.started) / 60, 2))
        return code is not None

    def stop(self) -> None:
        """Ends the process if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def _write_record(self, **outcome):
        self.record = {"arguments": self.arguments, "data": self.data, **outcome}
        self._record_file.write_text(json.dumps(self.record, indent=1) + "\n")


class Display:
    """The progress of one run: a bar on a terminal, one line an epoch in a log."""

    def __init__(self, run: Run, position: int):
        self.run, self.epochs_shown = run, 0
        self.bar = tqdm(
            total=run.steps * run.batch, desc=f"{run.name:11}", position=position, unit=" pairs", unit_scale=True,
            disable=None,
        )  # fmt: skip

    def update(self) -> None:
        """Shows what the run has written since the last call."""
        results = read_results(self.run.folder)
        if not self.bar.disable:
            self.bar.update(samples_done(read_log(self.run.folder)) - self.bar.n)
            if results:
                self.bar.set_postfix_str(_recall(results[-1]))
        for result in results[self.epochs_shown :] if self.bar.disable else ():
            print(f"{self.run.name}: epoch {result['epoch']}/{self.run.epochs}, {_recall(result)}", flush=True)
        self.epochs_shown = len(results)

    def close(self) -> None:
        """Shows the end of the run."""
        self.update()
        self.bar.close()
        outcome = f"FAILED, {self.run.error}" if self.run.error else f"done in {self.run.record['minutes']} minutes"
        tqdm.write(f"{self.run.name}: {outcome}")


def _recall(result: dict) -> str:
    return f"R@1 {100 * result['image_to_text_R@1']:.1f} / {100 * result['text_to_image_R@1']:.1f}"


def train_all(runs: list[Run], jobs: int, on_end: Callable[[Run], None] = lambda run: None) -> None:
    """Runs what is not done yet, `jobs` at a time, in order. On an interrupt every process is ended.

    `on_end` is called with every run, also one that was done before or failed.
    """
    waiting = [run for run in runs if not run.is_done()]
    for run in runs:
        if run not in waiting:
            print(f"{run.name}: done before with the same command and data, used again", flush=True)
            on_end(run)
    places: list[Display | None] = [None] * jobs
    try:
        while waiting or any(places):
            for i, shown in enumerate(places):
                if shown is None and waiting:
                    run = waiting.pop(0)
                    run.start()
                    places[i] = Display(run, position=i)
                elif shown is not None and shown.run.has_ended():
                    shown.close()
                    places[i] = None
                    on_end(shown.run)
                elif shown is not None:
                    shown.update()
            time.sleep(0.5)
    finally:
        for run in runs:
            run.stop()

"""Run the command line as a user does, in forked processes of a parent that has imported everything already.

An interpreter with OpenCLIP's imports takes five seconds to start; a fork takes none.
"""

import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import open_clip
import open_clip_train.main  # noqa: F401  the forks inherit it
import torch

import open_clip_train_fastclip.openclip.hooks  # noqa: F401
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.openclip import register_models

register_models()
open_clip.add_model_config(Path(__file__).parent / "model_configs")

# Of ViT-Glyph-32's three million weights nearly all are the tokens'; this one has an eighth, for quick steps and saves.
MODEL = "ViT-Test-32"
TINY = (
    f"--model {MODEL} --device cpu --precision fp32 --workers 0 --batch-size 8 --epochs 1 --lr 1e-3 --warmup 2 "
    "--log-every-n-steps 1 --seed 1"
).split()
INSTALLED_MODEL = ("--model", "ViT-Glyph-32")  # after TINY, for interpreters that are no forks of this one


@dataclass
class Finished:
    """Exit codes by rank and what each rank wrote to its standard output and error."""

    codes: list[int]
    output: list[str]

    @property
    def ok(self) -> bool:
        return all(code == 0 for code in self.codes)

    def __str__(self):
        ranks = enumerate(zip(self.codes, self.output, strict=True))
        return "\n".join(f"rank {rank}: exit {code}\n{output}" for rank, (code, output) in ranks)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(function, arguments, log: Path, env: dict) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")  # as Python's own
    os.environ.update(env)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where they are ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    code = 70
    try:
        code = function(*arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


@dataclass
class Running:
    """Forked processes by rank, and the files that they write their output to."""

    pids: list[int]
    logs: list[Path]

    def wait(self, timeout: float = 120) -> Finished:
        """Wait until all have ended; those that have not by then are killed, with their children."""
        codes: dict[int, int] = {}
        deadline = time.monotonic() + timeout
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                for pid in set(self.pids) - set(codes):
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = -signal.SIGKILL
            time.sleep(0.02)
        return Finished([codes[pid] for pid in self.pids], [log.read_text(errors="replace") for log in self.logs])


def start_forked(function, arguments, folder: Path, ranks: int = 1, env: dict | None = None) -> Running:
    """Call function(*arguments) in forked processes with torchrun's environment; its result is the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.monotonic_ns()
    shared = {"OMP_NUM_THREADS": "1", **(env or {})}
    if ranks > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    pids, logs = [], []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        log = folder / f"output-{stamp}-{rank}.txt"
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            _child(function, arguments, log, shared | own)
        pids.append(pid)
        logs.append(log)
    return Running(pids, logs)


def run_forked(function, arguments, folder: Path, timeout: float = 120, **kwargs) -> Finished:
    """start_forked(), and wait."""
    return start_forked(function, arguments, folder, **kwargs).wait(timeout)


def run_cli(arguments, folder: Path, **kwargs) -> Finished:
    """Run our command line with `arguments`; output and exit code of every rank."""
    return run_forked(main, (list(map(str, arguments)),), folder, **kwargs)


def start_cli(arguments, folder: Path, **kwargs) -> Running:
    """Start our command line with `arguments`."""
    return start_forked(main, (list(map(str, arguments)),), folder, **kwargs)

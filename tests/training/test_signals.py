"""Ctrl-C and a closed terminal: the run saves and ends, as for SIGTERM; a second Ctrl-C ends it at once."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from cli import INSTALLED_MODEL, TINY, run_forked, start_cli
from make_data import make_csv, make_shards

from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.training.signals import PreemptionSignals

ENOUGH = 60  # seconds to wait for what takes less than one


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=48)


def flags(data, logs, *more):
    given = [*TINY, "--train-data", data, "--logs", logs, "--name", "run", "--epochs", 500, "--save-frequency", 0]
    return list(map(str, [*given, *more]))


def wait_for(path, text):
    until = time.monotonic() + ENOUGH
    while not (path.exists() and text in path.read_text(errors="replace")):
        assert time.monotonic() < until, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.05)


def saved(logs):
    return [path.name for path in (logs / "run" / "checkpoints").glob("epoch_*_step_*")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_signals_all_processes_of_a_run(number, ranks, tmp_path):
    data = make_shards(tmp_path / "data", shards=2, per_shard=32)
    argv = flags(data, tmp_path, "--loss", "fastclip-v3", "--workers", 1)
    run = start_cli(argv, tmp_path / "out", ranks=ranks)
    wait_for(tmp_path / "run" / "out.log", "Start epoch 1")
    for pid in run.pids:
        os.killpg(pid, number)
    ended = run.wait(ENOUGH)
    assert ended.codes == [75] * ranks and "Traceback" not in str(ended), ended
    assert len(saved(tmp_path)) == 1
    assert ended.output[0].count("a signal asked this run to end: it is saved in") == 1


def test_ctrl_c_of_a_run_that_cannot_be_saved(csv, tmp_path):
    """Plain OpenCLIP's losses save at epochs' ends: a line says so."""
    run = start_cli(flags(csv, tmp_path, "--loss", "clip"), tmp_path / "out")
    wait_for(tmp_path / "run" / "out.log", "Start epoch 1")
    os.killpg(run.pids[0], signal.SIGINT)
    ended = run.wait(ENOUGH)
    assert ended.codes == [130] and "Traceback" not in str(ended), ended
    assert "interrupted: nothing was saved since the last checkpoint" in ended.output[0]


def interrupted_twice(argv):
    """Ctrl-C while the save of the first one hangs."""
    from open_clip_train_fastclip.training.checkpointer import AsyncCheckpointer

    def hang(self, progress):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(ENOUGH)

    AsyncCheckpointer.save = hang
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
    return main(argv)


def test_a_second_ctrl_c_ends_it_at_once(csv, tmp_path):
    run = run_forked(interrupted_twice, (flags(csv, tmp_path, "--loss", "fastclip-v3"),), tmp_path / "out", timeout=50)
    assert run.codes == [-signal.SIGINT] and "Traceback" not in str(run), run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_nohup_ignores_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        signals = PreemptionSignals()
        signals.watch()
        os.kill(os.getpid(), number)
        assert signals.received is None
        signals.unwatch()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_terminal_that_is_closed(csv, tmp_path):
    """The bar and the log lines have nowhere to go then, and the run saves all the same."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # a bar needs room
    argv = flags(csv, tmp_path, "--loss", "fastclip-v3", *INSTALLED_MODEL)
    process = subprocess.Popen(
        [sys.executable, "-m", "open_clip_train_fastclip.main", *argv], stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(slave)
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(iter(lambda: read(master), b"")), daemon=True)
    reader.start()
    wait_for(tmp_path / "run" / "out.log", "Start epoch 1")
    os.close(master)
    assert process.wait(ENOUGH) == 75, (tmp_path / "run" / "out.log").read_text()[-3000:]
    assert len(saved(tmp_path)) == 1 and b"epoch 1/500: " in b"".join(shown)


def take_terminal():
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # becomes the controlling one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def read(descriptor):
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""

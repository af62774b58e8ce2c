"""What is logged before OpenCLIP sets its logging up, and torch's own loggers, which shall not have the last word."""

import logging
import os
import subprocess
import sys

import torch
from cli import INSTALLED_MODEL, TINY, run_cli

from open_clip_train_fastclip.openclip.logs import torch_log_levels_kept

SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "8", "--loss", "fastclip-v3"]


def test_the_last_line_of_a_run_is_its_own(tmp_path):
    """An interpreter of its own, since torch speaks when that ends."""
    argv = [*TINY, *INSTALLED_MODEL, *SYNTHETIC, "--logs", str(tmp_path)]
    command = [sys.executable, "-m", "open_clip_train_fastclip.main", *argv]
    env = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=env)
    assert run.returncode == 0 and run.stdout.splitlines()[-1].split(" | ")[2].startswith("FastCLIP Epoch: 0"), run


def test_a_warning_before_the_log_is_set_up_stands_in_it_once(tmp_path):
    argv = [*TINY, *SYNTHETIC, "--logs", tmp_path, "--name", "run", "--epochs", 2]
    assert run_cli([*argv, "--stop-epochs", 1], tmp_path / "out").ok
    torch.save({"weight": torch.zeros(1)}, tmp_path / "run" / "checkpoints" / "epoch_7.pt")
    run = run_cli([*argv, "--resume", "latest"], tmp_path / "out")
    assert run.ok and "INFO:" not in run.output[0] and "WARNING:" not in run.output[0], run
    log = (tmp_path / "run" / "out.log").read_text()
    for text in (run.output[0], log[log.rindex("epoch_7.pt holds") :]):
        assert text.count("Start epoch 1\n") == 1 and text.count("epoch_7.pt holds no training state") == 1, text


def test_levels_that_torch_was_given_stay():
    names = ("torch", "torch.given", "torch.other", "openclip.own")
    before = {name: logging.getLogger(name).level for name in names}
    logging.getLogger("torch.given").setLevel(logging.DEBUG)
    logging.getLogger("torch").setLevel(logging.NOTSET)
    try:
        with torch_log_levels_kept():
            for name in names:
                logging.getLogger(name).setLevel(logging.INFO)
        levels = {name: logging.getLogger(name).getEffectiveLevel() for name in names}
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    assert levels == {
        "torch": logging.WARNING,
        "torch.given": logging.DEBUG,
        "torch.other": logging.WARNING,
        "openclip.own": logging.INFO,
    }

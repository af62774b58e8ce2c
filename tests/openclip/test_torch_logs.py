"""torch's own loggers do not speak at a run's end, unless they are asked to."""

import logging
import os
import subprocess
import sys

from cli import TINY

from open_clip_train_fastclip.openclip.torch_logs import torch_log_levels_kept

SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "8", "--loss", "fastclip-v3"]


def test_the_last_line_of_a_run_is_its_own(tmp_path):
    """An interpreter of its own, since torch speaks when that ends."""
    command = [sys.executable, "-m", "open_clip_train_fastclip.main", *TINY, *SYNTHETIC, "--logs", str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=env)
    assert run.returncode == 0 and run.stdout.splitlines()[-1].split(" | ")[2].startswith("FastCLIP Epoch: 0"), run


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

"""What command lines resolve to, those of the released code and of the recipes among them."""

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import open_clip_train.params
import pytest

from open_clip_train_fastclip.openclip import settings

STOCK = open_clip_train.params.argparse
TRAIN = ["--train-data", "shards/{000..009}.tar"]
V3 = [*TRAIN, "--loss", "fastclip-v3"]
SLURM = Path(__file__).parents[2] / "scripts" / "slurm"


def parse(*argv, parser=settings.MergedParser):
    """The namespace as main() gets it, before resolve()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip_train.params, "argparse", SimpleNamespace(ArgumentParser=parser))
        return open_clip_train.params.parse_args(list(argv))


def resolved(*argv):
    args = parse(*argv)
    settings.resolve(args)
    return args


def config(args, num_samples=10_000, global_batch_size=1024, total_steps=None, stored=None):
    return settings.config_from_args(
        args, num_samples=num_samples, global_batch_size=global_batch_size, total_steps=total_steps, stored=stored
    )


def released_command(name):
    """Arguments of one run in released_commands.txt."""
    text = Path(__file__).with_name("released_commands.txt").read_text()
    common = re.search(r"^# Common to CC3M: (.*?)\s+\(\d+ GPUs\)", text, re.M).group(1)
    command = re.search(rf"^{name}:\s+(.*?)(?:\s+\(\d+ GPUs?\))?$", text, re.M).group(1)
    return shlex.split(f"{common} {command}" if name.startswith("cc3m") else command)


def recipe_flags(recipe, loss):
    """What the batch script makes of a recipe."""
    script = f"""
        set -eu
        script=test here={SLURM} DATA=/data flags=()
        . "$here/common.sh"
        read_flags "$here/recipes/{recipe}.args" {loss}
        printf '%s\\0' "${{flags[@]}}"
    """
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return [*output.split("\0")[:-1], "--loss", loss]

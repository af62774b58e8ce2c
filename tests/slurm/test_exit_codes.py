"""What the batch scripts say of srun's exit codes."""

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (134, "tasks aborted, as NCCL lets them if a rank is lost"),
        (137, "killed, by srun when another one had failed"),
        (143, "killed, by srun when another one had failed"),
        (1, "see above what the first task says"),
        (2, "see above what the first task says"),
    ],
)
def test_a_lost_rank_is_told_by_its_exit_code(code, words):
    source = f"script=x here={SCRIPTS}; . {SCRIPTS}/common.sh; why_ended {code}"
    line = subprocess.run(["bash", "-euc", source], capture_output=True, text=True, check=True).stdout
    assert words in line and line.count("\n") == 1
    assert ("submit the job again, and it continues" in line) == (code > 128)

"""A user's slip ends all ranks with exit code 2 and one line; tests/openclip/test_slips.py has the table of slips."""

import pytest
from cli import TINY, run_cli
from make_data import make_csv, make_shards

LOCKED = ["--lock-image", "--lock-text", "--lock-text-freeze-layer-norm"]


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=32)


def refused(run, *words):
    complaints = [line for output in run.output for line in output.splitlines() if "error" in line.lower()]
    assert set(run.codes) == {2} and "Traceback" not in str(run), run
    assert len(complaints) == 1 and all(word in complaints[0] for word in words), run


@pytest.mark.parametrize("loss, ranks", [("clip", 1), ("fastclip-v3", 2)])
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seed", "-1"], "--seed is -1"),
        (["--logs", __file__], "Not a directory"),
        (["--lock-text"], "add --lock-text-freeze-layer-norm"),
        (["--pretrained", __file__], "cannot be built with --pretrained ("),
        (["--resume", "."], "--resume . is a folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_slips(flags, words, loss, ranks, csv, tmp_path):
    command = [*TINY, "--loss", loss, "--train-data", csv, "--logs", tmp_path / "logs", "--name", "run", *flags]
    refused(run_cli(command, tmp_path / "out", ranks=ranks), words)


@pytest.mark.parametrize("loss", ["clip", "siglip", "fastclip-v3", "isogclr"])
def test_nothing_left_to_train(loss, csv, tmp_path):
    command = [*TINY, "--loss", loss, "--train-data", csv, "--logs", tmp_path, "--name", "run", *LOCKED]
    refused(run_cli(command, tmp_path / "out", ranks=2), "--lock-image and --lock-text leave nothing to train")


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK is 3"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"WORKER": "1", "NUM_WORKERS": "2"}, "WORKER is '1'"),
        ({"SLURM_NTASKS": "4"}, "start the run with srun"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "start the run with srun"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_environment(variables, words, tmp_path):
    make_shards(tmp_path / "data", shards=2, per_shard=8)
    command = [*TINY, "--train-data", f"{tmp_path}/data/{{00000..00001}}.tar", "--logs", tmp_path, "--name", "run"]
    refused(run_cli(command, tmp_path / "out", env=variables), words)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_left_over_does_not_hide_the_line(csv, tmp_path):
    command = [*TINY, "--train-data", csv, "--logs", tmp_path, "--seed", "-1"]
    refused(run_cli(command, tmp_path / "out", env={"RANK": "3"}), "--seed")

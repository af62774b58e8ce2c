"""--fastclip-temperature of a resumed run: a constant one is obeyed, another start of a learned one is refused."""

import json
import math
import re

import pytest
import torch
from cli import TINY, run_cli, run_forked
from make_data import make_csv

from open_clip_train_fastclip import preflight
from open_clip_train_fastclip.loss.config import CONSTANT, LOSSES, losses_with


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=16)


def in_force(run):
    """tau in the log lines of the steps, and what is said of it when the run goes on."""
    (said,) = re.findall(r"INFO \| (tau .*)", run.output[0])
    return [float(tau) for tau in re.findall(r"FastCLIP Epoch: .* tau: (\S+)", run.output[0])], said


def stored(logs, epoch):
    """tau of a state (None: individual ones), the start it knows, and the logit scale of the model."""
    folder = logs / "run" / "checkpoints"
    index = json.loads((folder / f"epoch_{epoch}.fastclip" / "index.json").read_text())
    scale = torch.load(folder / f"epoch_{epoch}.pt", weights_only=True)["state_dict"]["logit_scale"]
    log_inv_tau = index["tau"].get("log_inv_tau")
    return log_inv_tau, index["settings"]["temperature"], scale.item()


@pytest.mark.parametrize("loss", LOSSES)
def test_another_temperature_at_a_resume(loss, csv, tmp_path):
    flags = [*TINY, "--loss", loss, "--train-data", csv, "--logs", tmp_path, "--name", "run"]
    assert run_cli([*flags, "--fastclip-temperature", "0.05"], tmp_path / "out").ok
    tau, start, _ = stored(tmp_path, 1)
    assert start == 0.05

    again = [*flags, "--resume", "latest", "--epochs", 2, "--fastclip-temperature"]
    run = run_cli([*again, "0.2"], tmp_path / "out")
    if loss not in losses_with(CONSTANT):
        assert run.codes == [2] and "Traceback" not in str(run), run
        assert f"0.2 is another start than 0.05, from where --loss {loss}" in run.output[0], run
        assert not (tmp_path / "run" / "checkpoints" / "epoch_2.pt").exists()
        run = run_forked(preflight.main, (["--", *map(str, [*again, "0.2"])],), tmp_path / "out")
        assert run.codes == [2] and "another start" in run.output[0], run
        run = run_cli([*again, "0.05"], tmp_path / "out")  # as a batch script does
        assert run.ok and in_force(run)[1].startswith("tau goes on at 0.0"), run
        return
    assert run.ok and in_force(run) == (
        [0.2, 0.2],
        "tau is 0.2, as --fastclip-temperature says; in the state it was 0.05",
    )
    tau, start, scale = stored(tmp_path, 2)
    assert (start, tau, scale) == (0.2, pytest.approx(1.6094, rel=1e-4), pytest.approx(1.6094, rel=1e-4))
    run = run_cli([*flags, "--resume", "latest", "--epochs", 3], tmp_path / "out")  # and stays
    assert run.ok and in_force(run) == ([0.2, 0.2], "tau goes on at 0.2"), run


def test_the_released_default_is_no_start_that_is_given(csv, tmp_path):
    flags = [*TINY, "--fastclip", "--train-data", csv, "--logs", tmp_path, "--name", "run"]
    assert run_cli([*flags, "--temperature", "0.05"], tmp_path / "out").ok
    run = run_cli([*flags, "--resume", "latest", "--epochs", 2], tmp_path / "out")
    assert run.ok and stored(tmp_path, 2)[1] == 0.05, run


@pytest.mark.parametrize("frozen", [True, False])
def test_openclips_own_temperature_at_a_resume(frozen, csv, tmp_path):
    """A frozen one is obeyed; where a learned one started is not known any more."""
    flags = [*TINY, "--train-data", csv, "--logs", tmp_path, "--name", "run", *(["--freeze-temperature"] * frozen)]
    assert run_cli([*flags, "--temperature", "0.05"], tmp_path / "out").ok
    run = run_cli([*flags, "--resume", "latest", "--epochs", 2, "--temperature", "0.2"], tmp_path / "out")
    scale = torch.load(tmp_path / "run" / "checkpoints" / "epoch_2.pt")["state_dict"]["logit_scale"].item()
    said = "tau is 0.2, as --temperature says; in the checkpoint it was 0.05" if frozen else "tau goes on at 0.0"
    assert run.ok and said in run.output[0], run
    assert scale == pytest.approx(math.log(5 if frozen else 20), rel=1e-3)

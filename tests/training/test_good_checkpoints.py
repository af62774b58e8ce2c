"""A good checkpoint is never replaced by a bad one: what is saved, and what goes, when numbers are not finite."""

import math
import os
import signal
import time
from argparse import Namespace

import open_clip_train.main
import pytest
import torch
from cli import TINY, run_cli, run_forked
from make_data import make_csv
from safetensors.torch import load_file

from open_clip_train_fastclip import preflight
from open_clip_train_fastclip.checkpoint import mid_epoch
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.openclip.checkpoints import EpochCheckpoints
from open_clip_train_fastclip.training.save_trigger import SaveTrigger

STEPS = 12  # of an epoch on one rank


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=8 * STEPS)


def flags(csv, logs, *more, loss="fastclip-v3"):
    return list(map(str, [*TINY, "--loss", loss, "--train-data", csv, "--logs", logs, "--name", "run", *more]))


def with_faults(argv, gradients=(), weights=math.inf, bad_rank=0, signal_at=None):
    """The command line, in which backward passes (from 0) of a rank give NaN, or the weights become NaN in a forward
    pass; signal_at: SIGTERM comes before this step (from 1) is over."""
    create, done = open_clip_train.main.create_model_and_transforms, {"forward": 0, "backward": 0}

    def create_model_and_transforms(model_name, *args, **kwargs):
        model, *transforms = create(model_name, *args, **kwargs)
        parameter = model.visual.conv1.weight

        def spoil_gradient(gradient):
            done["backward"] += 1
            bad = done["backward"] - 1 in gradients and int(os.environ.get("RANK", 0)) == bad_rank
            return gradient * math.nan if bad else None

        def spoil_weights(module, inputs):
            done["forward"] += module.training
            if done["forward"] > weights:
                parameter.data.fill_(math.nan)

        parameter.register_hook(spoil_gradient)
        model.register_forward_pre_hook(spoil_weights)
        return model, *transforms

    decide = SaveTrigger.decide

    def be_signalled_and_decide(self, progress, written):
        if progress.global_step == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return decide(self, progress, written)

    open_clip_train.main.create_model_and_transforms = create_model_and_transforms
    SaveTrigger.decide = be_signalled_and_decide
    return main(argv)


def saved(logs):
    """Names of a run's checkpoints, which are complete and hold nothing that is not finite."""
    found = {path.name for path in (logs / "run" / "checkpoints").iterdir()}
    for path in (logs / "run" / "checkpoints").rglob("*.pt"):
        contents = torch.load(path, weights_only=True)
        tensors = [*contents["state_dict"].values(), *map(torch.as_tensor, moments(contents))]
        assert all(tensor.isfinite().all() for tensor in tensors), path
    for path in (logs / "run" / "checkpoints").rglob("rank-*.safetensors"):
        for name, rows in load_file(path).items():
            assert not rows.isnan().any() or name == "data.numpy_gauss", (path, name)
    assert not any(name.endswith(".tmp") for name in found)
    return found


def moments(contents):
    return [value for state in contents["optimizer"]["state"].values() for value in state.values()]


def refused(run, *words):
    """One line with these words, exit code 2 on every rank, no traceback."""
    assert all(code == 2 for code in run.codes) and "Traceback" not in str(run), run
    (line,) = [line for output in run.output for line in output.splitlines() if "error" in line.lower()]
    for word in words:
        assert str(word) in line, line


@pytest.mark.parametrize(
    ("loss", "ranks", "more"),
    [
        ("fastclip-v3", 1, []),
        ("fastclip-v3", 2, []),
        ("fastclip-v2", 2, ["--grad-compression", "bf16"]),
        ("fastclip-v1", 1, ["--accum-freq", 2]),
        ("fastclip-v3", 1, ["--precision", "amp"]),
        ("fastclip-v3", 1, ["--grad-clip-norm", 1]),
        ("clip", 1, []),
        ("clip", 2, []),
        ("siglip", 1, ["--accum-freq", 2]),
    ],
)
def test_an_overflow_in_the_backward_pass_costs_one_step(loss, ranks, more, csv, tmp_path):
    argv = flags(csv, tmp_path, "--save-every", "2steps", "--keep", 99, *more, loss=loss)
    run = run_forked(with_faults, (argv, [3], math.inf, ranks - 1), tmp_path / "out", ranks=ranks)
    assert run.ok, run
    accum = 2 if "--accum-freq" in more else 1
    steps, bad = STEPS // accum // ranks, 4 // accum
    names = {f"epoch_0_step_{step + (step == bad)}" for step in range(2, steps + 1, 2)}
    assert saved(tmp_path) == names | {"epoch_1.pt"} | ({"epoch_1.fastclip"} if loss.startswith("fast") else set())
    contents = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert {state["step"].item() for state in contents["optimizer"]["state"].values()} == {steps - 1}


@pytest.mark.parametrize(("loss", "ranks"), [("fastclip-v3", 2), ("fastclip-v2", 1), ("clip", 2), ("siglip", 1)])
def test_weights_that_are_not_finite_are_not_saved(loss, ranks, csv, tmp_path):
    """The two good checkpoints stay, and the run goes on from the newer one."""
    argv = flags(csv, tmp_path, "--save-every", "1steps", "--keep", 2, "--epochs", 2, loss=loss)
    run = run_forked(with_faults, (argv, (), 4), tmp_path / "out", ranks=ranks)
    newest = tmp_path / "run" / "checkpoints" / "epoch_0_step_4"
    refused(run, "conv1.weight", "nothing is saved", newest)
    assert saved(tmp_path) == {"epoch_0_step_3", "epoch_0_step_4", "epoch_0_step_2"}
    run = run_cli([*argv, "--resume", "latest"], tmp_path / "out", ranks=ranks)
    assert run.ok and f"Found latest resume checkpoint at {newest}" in run.output[0], run
    assert "epoch_2.pt" in saved(tmp_path)


@pytest.mark.parametrize(("loss", "ranks"), [("fastclip-v3", 1), ("clip", 1), ("clip", 2)])
def test_at_an_epochs_end_nothing_replaces_a_good_checkpoint(loss, ranks, csv, tmp_path):
    argv = flags(csv, tmp_path, "--epochs", 3, "--save-most-recent", "--delete-previous-checkpoint", loss=loss)
    run = run_forked(with_faults, (argv, (), 2 * STEPS // ranks - 1), tmp_path / "out", ranks=ranks)
    refused(run, "numbers that are not finite", f"the newest good checkpoint, {tmp_path}/run/checkpoints/epoch_")
    states = {"epoch_1.fastclip"} if loss.startswith("fast") else set()
    assert saved(tmp_path) == {"epoch_1.pt", "epoch_latest.pt"} | states
    run = run_cli([*argv, "--resume", "latest"], tmp_path / "out", ranks=ranks)
    assert run.ok and "Start epoch 1\n" in run.output[0] and "Start epoch 0\n" not in run.output[0], run


def test_too_many_bad_steps_add_nothing_when_nothing_was_trained(csv, tmp_path):
    argv = flags(csv, tmp_path, "--epochs", 4)
    assert run_cli([*argv, "--stop-epochs", 1], tmp_path / "out").ok
    for _ in range(2):
        run = run_forked(with_faults, ([*argv, "--resume", "latest"], range(99)), tmp_path / "out")
        refused(run, "10 steps in a row", "epoch_1.pt, since which nothing was trained")
        assert saved(tmp_path) == {"epoch_1.pt", "epoch_1.fastclip"}


def test_what_was_trained_before_too_many_bad_steps_is_saved_and_replaces_nothing(csv, tmp_path):
    argv = flags(csv, tmp_path, "--save-every", "2steps", "--keep", 1)
    run = run_forked(with_faults, (argv, range(2, 99)), tmp_path / "out")
    refused(run, "10 steps in a row", "epoch_0_step_2, since which nothing was trained")
    assert saved(tmp_path) == {"epoch_0_step_2"}
    argv = flags(csv, tmp_path, "--save-every", "8steps", "--keep", 1, "--name", "other", "--epochs", 2)
    run = run_forked(with_faults, (argv, range(STEPS + 1, 99)), tmp_path / "out")
    refused(run, "10 steps in a row", "go on from the state before them", "epoch_1_step_11")
    left = {path.name for path in (tmp_path / "other" / "checkpoints").glob("*_step_*")}
    assert left == {"epoch_0_step_8", "epoch_1_step_11"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_a_bad_step_is_looked_at_after_the_next_good_one(ranks, csv, tmp_path):
    run = run_forked(with_faults, (flags(csv, tmp_path), [1, 2], math.inf, 0, 2), tmp_path / "out", ranks=ranks)
    assert run.codes == [75] * ranks, run
    assert saved(tmp_path) == {"epoch_0_step_4"}


def test_an_epoch_that_ends_with_a_bad_step_is_saved_and_replaces_nothing(csv, tmp_path):
    argv = flags(csv, tmp_path, "--epochs", 3, "--save-most-recent", "--delete-previous-checkpoint")
    run = run_forked(with_faults, ([*argv, "--stop-epochs", "2"], [2 * STEPS - 1]), tmp_path / "out")
    assert run.ok, run
    states = {f"epoch_{epoch}.fastclip" for epoch in (1, 2)}
    assert saved(tmp_path) == {"epoch_1.pt", "epoch_2.pt", "epoch_latest.pt", *states}
    assert torch.load(tmp_path / "run" / "checkpoints" / "epoch_latest.pt", weights_only=True)["epoch"] == 1
    (tmp_path / "other").mkdir()
    argv = flags(csv, tmp_path / "other", "--epochs", 3, "--delete-previous-checkpoint")
    run = run_forked(with_faults, (argv, [2 * STEPS - 1]), tmp_path / "out")
    assert run.ok and saved(tmp_path / "other") == {"epoch_3.pt", "epoch_3.fastclip"}, (
        "it goes when a good one followed"
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_without_a_good_step_is_not_saved(ranks, csv, tmp_path):
    """Two epochs of fewer steps than end a run: the first one is good."""
    argv = flags(csv, tmp_path, "--epochs", 3, "--batch-size", 16 // ranks)
    steps = STEPS // 2
    run = run_forked(with_faults, (argv, range(steps, 99)), tmp_path / "out", ranks=ranks)
    refused(run, "all steps of epoch 1 were left out", "the newest good checkpoint", "epoch_1.pt")
    assert saved(tmp_path) == {"epoch_1.pt", "epoch_1.fastclip"}


@pytest.mark.parametrize("loss", ["fastclip-v3", "clip"])
def test_nothing_is_saved_while_a_scaler_skips_every_step(loss, csv, tmp_path):
    argv = flags(csv, tmp_path, "--precision", "amp", "--save-every", "1steps", "--keep", 1, "--epochs", 4, loss=loss)
    run = run_forked(with_faults, (argv, range(3, 99)), tmp_path / "out")
    refused(run, "all steps of epoch 1 were left out", "epoch_1.pt")
    states = {"epoch_1.fastclip"} if loss.startswith("fast") else set()
    assert saved(tmp_path) == {"epoch_0_step_3", "epoch_0_step_2", "epoch_1.pt"} | states


def test_a_scaler_may_take_an_epoch_to_find_its_scale(csv, tmp_path):
    run = run_forked(with_faults, (flags(csv, tmp_path, "--precision", "amp", "--epochs", 2), range(STEPS)), tmp_path)
    assert run.ok and saved(tmp_path) >= {"epoch_1.pt", "epoch_2.pt"}, run


def test_what_was_held_back_goes_when_the_next_epoch_is_known_to_be_good(tmp_path):
    """Not before it is looked through: it may be the newest one that is good."""
    args = Namespace(
        save_most_recent=False, delete_previous_checkpoint=True, save_frequency=1, epochs=9, logs="logs", rank=0,
        checkpoint_path=tmp_path,
    )  # fmt: skip
    checkpoints, held_back = EpochCheckpoints(args), tmp_path / "epoch_1.pt"
    held_back.touch()

    def refuse():
        raise UserError("not finite")

    good, bad = (Namespace(require_finite=check, loss=None, data=None) for check in (lambda: None, refuse))
    assert checkpoints.end_epoch(good, 2, is_good=False) and not args.delete_previous_checkpoint
    with pytest.raises(UserError, match="not finite"):
        checkpoints.end_epoch(bad, 3)
    assert held_back.exists()
    assert checkpoints.end_epoch(good, 3) and args.delete_previous_checkpoint and not held_back.exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_good_checkpoint_that_is_being_written_is_completed(ranks, csv, tmp_path):
    """The run ends with an error meanwhile."""

    def with_slow_writes(argv):
        write = mid_epoch.write_part

        def slow_write(*part):
            time.sleep(1)
            return write(*part)

        mid_epoch.write_part = slow_write
        return with_faults(argv, weights=STEPS // ranks - 1)

    argv = flags(csv, tmp_path, "--save-every", f"{STEPS // ranks - 2}steps", "--save-async")
    run = run_forked(with_slow_writes, (argv,), tmp_path / "out", ranks=ranks)
    name = f"epoch_0_step_{STEPS // ranks - 2}"
    refused(run, "conv1.weight", f"the newest good checkpoint, {tmp_path}/run/checkpoints/{name}")
    assert saved(tmp_path) == {name}


@pytest.mark.parametrize("loss", ["fastclip-v3", "clip"])
def test_a_checkpoint_that_is_not_finite_is_refused_and_the_newest_good_one_named(loss, csv, tmp_path):
    """Earlier versions have saved such ones."""
    argv = flags(csv, tmp_path, "--epochs", 3, loss=loss)
    assert run_cli([*argv, "--stop-epochs", 2], tmp_path / "out").ok
    path = tmp_path / "run" / "checkpoints" / "epoch_2.pt"
    contents = torch.load(path, weights_only=True)
    contents["state_dict"]["visual.conv1.weight"].fill_(math.nan)
    torch.save(contents, path)
    for ranks in (1, 2):
        run = run_cli([*argv, "--resume", "latest"], tmp_path / "out", ranks=ranks)
        refused(run, path, "conv1.weight", "the newest good checkpoint", "epoch_1.pt")
    run = run_forked(preflight.main, (["--", *argv, "--resume", "latest"],), tmp_path / "out")
    refused(run, path, "epoch_1.pt")

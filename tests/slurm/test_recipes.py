"""The recipes of the batch scripts give the published settings, and flags that the training command takes."""

import subprocess

import pytest
from resolved_flags import SLURM, config, recipe_flags, released_command, resolved

RECIPES = ("medium_cc3m", "large_cc12m", "xlarge_laion400m")
LOSSES = ("clip", "siglip", "sogclr", "isogclr", *(f"fastclip-v{i}" for i in range(4)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_recipe_has_flags_for_every_loss(recipe, loss):
    args = resolved(*recipe_flags(recipe, loss))
    assert args.loss == loss
    assert args.train_data.startswith("/data/")
    assert args.train_data.endswith(".tar")
    assert "{00000.." in args.train_data


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_two_losses_differ_in_the_loss_alone(recipe):
    args = [vars(resolved(*recipe_flags(recipe, loss))) for loss in ("fastclip-v1", "fastclip-v3")]
    assert {name for name in args[0] if args[0][name] != args[1][name]} == {"loss", "fastclip"}


@pytest.mark.parametrize(
    ("recipe", "loss", "command"),
    [
        ("medium_cc3m", "clip", "cc3m openclip"),
        *(("medium_cc3m", f"fastclip-v{i}", f"cc3m v{i}") for i in range(4)),
        ("large_cc12m", "fastclip-v3", "cc12m v3"),
        ("xlarge_laion400m", "fastclip-v3", "laion400m v3"),
    ],
)
def test_recipes_are_the_published_commands(recipe, loss, command):
    ours, released = resolved(*recipe_flags(recipe, loss)), resolved(*released_command(command))
    if loss != "clip":
        assert config(ours) == config(released)
    same = "model batch_size full_epochs workers lr lr_min wd warmup seed train_num_samples save_frequency".split()
    assert {name: getattr(ours, name) for name in same} == {name: getattr(released, name) for name in same}
    if loss == "clip":
        assert (ours.local_loss, ours.gather_with_grad) == (released.local_loss, released.gather_with_grad)


def test_the_dry_run_of_a_table_prints_one_command_for_each_loss_and_seed():
    script = SLURM / "submit_benchmark.sh"
    command = [script, "large", "--dry-run", "--seeds", "1 2", "--", "--workers", "8"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")
    assert len(lines) == 14
    assert lines[-1].strip() == (
        "env RECIPE=large_cc12m LOSS=v3 sbatch --job-name=large_cc12m-v3-seed2 --nodes=2 "
        f"{SLURM}/fastclip_32gpu.sh --name large_cc12m-v3-seed2 --seed 2 --workers 8"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small"], "usage: submit_benchmark.sh medium|large"),
        (["medium", "--nodes"], "usage:"),
        (["medium", "--seeds", "a"], "--seeds takes whole numbers"),
        (["medium", "--dry-run", "--", "--loss", "clip"], "--loss differs between the runs: leave it out"),
    ],
)
def test_wrong_input_of_the_table_is_one_line(arguments, message):
    result = subprocess.run([SLURM / "submit_benchmark.sh", *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.strip().split("\n")) == 1
    assert message in result.stderr

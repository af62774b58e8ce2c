"""The recipes of the batch scripts give the published settings, and flags that the training command takes."""

import pytest
from resolved_flags import config, recipe_flags, released_command, resolved

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

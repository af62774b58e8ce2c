"""What eps does: with 1/(B-1) and no memory FastCLIP is OpenCLIP's loss, and a pair that is solved fades as there."""

import math

import pytest
import torch
from drive import make_loss, on_ranks, rank_and_world_size, rank_slice
from open_clip.loss import ClipLoss
from trajectories import LOSSES, assert_close, golden_settings, random_steps

BATCH, TAU = 12, 0.05
AS_OPEN_CLIP = {"gamma": 1.0, "eps": 1 / (BATCH - 1), "temperature": TAU}


def both(settings):
    """For each step, this rank's feature gradients [2, b, d] of our loss and of ClipLoss, and its one of log(1/tau)."""
    rank, world_size = rank_and_world_size()
    fastclip, found = make_loss(settings), []
    clip = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    for image, text, ids, epoch in random_steps([range(BATCH), range(6, 18)], epochs=[0, 1], aligned=0.4):
        fastclip.start_epoch(epoch)
        mine = rank_slice(BATCH)
        ours, theirs = ([torch.tensor(f[mine], requires_grad=True) for f in (image, text)] for _ in range(2))
        log_scale = torch.tensor(-math.log(TAU), dtype=torch.float64, requires_grad=True)
        fastclip(*ours, torch.tensor(ids[mine])).backward()
        clip(*theirs, log_scale.exp()).backward()
        found.append((*(torch.stack([leaf.grad for leaf in leaves]) for leaves in (ours, theirs)), log_scale.grad))
    return found


def times_clip(loss, gradients):
    """Our gradients over ClipLoss's. Released: 1, but for the factor tau of v3. Paper: 2, and tau but for v0."""
    if gradients == "released":
        return TAU if loss == "fastclip-v3" else 1
    return 2 if loss == "fastclip-v0" else 2 * TAU


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("gradients", ["released", "paper"])
def test_without_memory_it_is_the_loss_of_open_clip(gradients, world_size):
    """In steps whose samples come again. Learned temperatures are held where they are."""
    changes = AS_OPEN_CLIP | {"tau_lr": 0.0, "gradients": gradients}
    settings = [golden_settings(loss, **changes) for loss in LOSSES]
    for results in on_ranks(world_size, lambda: [both(s) for s in settings]):
        for loss, steps in zip(LOSSES, results, strict=True):
            for ours, theirs, _ in steps:
                assert_close(ours, times_clip(loss, gradients) * theirs, 1e-12, loss)


def test_v0_learns_the_temperature_of_open_clip():
    """From twice its gradient, which Adam takes for the same."""
    settings = golden_settings("fastclip-v0", **AS_OPEN_CLIP)
    ((_, _, expected), _), fastclip = both(settings), make_loss(settings)
    ((image, text, ids, _),) = random_steps([range(BATCH)], epochs=[0], aligned=0.4)
    fastclip(torch.tensor(image).requires_grad_(), torch.tensor(text), torch.tensor(ids))
    assert_close(fastclip.tau_state()["m"] / (1 - settings["beta1"]), 2 * expected, 1e-12, "gradient of log(1/tau)")


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_fade_where_u_is_far_below_eps(loss):
    """Pairs at right angles to all others, whose u is exp(-1/tau), pull by u / (eps + u) of what they would."""
    u, features, found = math.exp(-1 / TAU), torch.eye(8, dtype=torch.float64), {}
    for eps in (1e-14, 1e-3, 0.5):
        leaves = [features.clone().requires_grad_() for _ in range(2)]
        make_loss(golden_settings(loss, eps=eps, temperature=TAU))(*leaves, torch.arange(8)).backward()
        found[eps] = torch.stack([leaf.grad for leaf in leaves])
    for eps in (1e-3, 0.5):
        assert_close(found[eps], found[1e-14] * u / (eps + u), 1e-5, f"eps {eps}")


@pytest.mark.parametrize(
    "loss, gradients", [("fastclip-v2", "released"), ("isogclr", "paper"), ("fastclip-v3", "paper")]
)
def test_temperatures_of_faded_pairs_fall_where_rho_is_above_the_log_of_eps(loss, gradients):
    assert moved_tau(loss, gradients, 0.9) > TAU > moved_tau(loss, gradients, 1.1)


def test_the_released_temperature_of_v3_rises_as_pairs_fade():
    assert moved_tau("fastclip-v3", "released", 1.1) > TAU


def moved_tau(loss, gradients, share):
    """The temperature after a step of pairs that have faded; rho is that share of ln(1/eps)."""
    settings = golden_settings(
        loss, eps=1e-3, temperature=TAU, rho=share * math.log(1000), gradients=gradients, num_samples=8
    )
    fastclip, features = make_loss(settings), torch.eye(8, dtype=torch.float64)
    fastclip(features.clone().requires_grad_(), features, torch.arange(8))
    return fastclip.temperature

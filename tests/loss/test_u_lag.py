"""u_lag, how far the estimates lag behind the model: against closed forms, on one rank and two, for every loss."""

import math

import numpy as np
import pytest
import torch
from drive import make_loss, on_ranks, rank_slice
from torch.nn.functional import normalize
from trajectories import LOSSES, golden_settings

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss

TAU, N = 0.1, 8
# ids and margin of the steps: 4 and 5 are first seen in step 1, 6 in step 3; 0 and 1 have skipped two steps then
STEPS = [([0, 1, 2, 3], 0.2), ([2, 3, 4, 5], 0.5), ([2, 4, 3, 5], 0.8), ([0, 2, 6, 1], 0.6)]


def pairs(margin):
    """Four equal pairs [4, 5] whose similarity to all others is 1 - margin, so that g is exp(-margin / tau)."""
    common, own = (torch.tensor(x, dtype=torch.float64).sqrt() for x in (1 - margin, margin))
    return torch.cat([common.expand(4, 1), own * torch.eye(4, dtype=torch.float64)], dim=1)


def expected(gamma):
    """For each step the lag of each pair of the global batch, nan at a first visit."""
    u, lags = np.zeros(N), []
    for step, (ids, margin) in enumerate(STEPS):
        g, first = math.exp(-margin / TAU), u[ids] == 0
        with np.errstate(divide="ignore"):
            lags.append(np.where(first, np.nan, np.log(u[ids]) + margin / TAU))
        weight = gamma if step else 1.0
        u[ids] = np.where(first, g, (1 - weight) * u[ids] + weight * g)
    return np.array(lags)


def measured(settings):
    """u_lag after each step, None where no pair was seen before; neither an evaluation nor begin_step changes it."""
    loss, found = make_loss(settings), []
    for step, (ids, margin) in enumerate(STEPS):
        loss.start_epoch(min(step, 1))
        mine = rank_slice(len(ids))
        features = pairs(margin)[mine]
        loss(features.clone().requires_grad_(), features, torch.tensor(ids[mine]))
        with torch.no_grad():
            loss(features.flip(1), features, torch.tensor(ids[mine]))
        found.append(loss.metrics().get("u_lag"))
        loss.begin_step(torch.tensor(STEPS[0][0][mine]))
        assert loss.metrics().get("u_lag") == found[-1], "until a step is done, it is that of the last one"
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_lag_is_that_of_the_ranks_pairs_that_were_seen_before(world_size, gamma):
    changes = {"gamma": gamma, "gamma_schedule": "constant", "temperature": TAU, "tau_lr": 0.0, "num_samples": N}
    settings = [golden_settings(loss, **changes) for loss in LOSSES]
    lags = expected(gamma).reshape(len(STEPS), world_size, -1)
    for rank, results in enumerate(on_ranks(world_size, lambda: [measured(s) for s in settings])):
        for found in results:
            for lag, of_pairs in zip(found, lags[:, rank], strict=True):
                seen = of_pairs[~np.isnan(of_pairs)]
                assert lag == (pytest.approx(seen.mean(), rel=1e-9) if len(seen) else None)


def mean_lag(gamma, tau, batch):
    """Of a model that stands still, over three epochs once gamma is what it is."""
    generator = torch.Generator().manual_seed(0)
    images, noise = (normalize(torch.randn(512, 32, generator=generator), dim=1) for _ in range(2))
    texts = normalize(images + 0.8 * noise, dim=1)
    config = FastCLIPConfig("fastclip-v1", 512, gamma=gamma, gamma_schedule="constant", temperature=tau)
    loss, lags = FastCLIPLoss(config), []
    for epoch in range(6):
        loss.start_epoch(epoch)
        for ids in torch.randperm(512, generator=generator).split(batch):
            loss(images[ids].requires_grad_(), texts[ids], ids)
            lags += [loss.metrics()["u_lag"]] if epoch > 2 else []
    return np.mean(lags)


def test_a_model_that_stands_still_has_a_lag_where_u_is_a_mean_of_several():
    assert abs(mean_lag(1.0, tau=0.03, batch=32)) < 0.1
    small, smaller_tau, larger_batch = mean_lag(0.3, 0.07, 32), mean_lag(0.3, 0.03, 32), mean_lag(0.3, 0.03, 128)
    assert 0.1 < small < smaller_tau and 0.1 < larger_batch < smaller_tau

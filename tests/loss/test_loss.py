"""FastCLIPLoss against the golden trajectories of the authors' code and against the float64 reference."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from drive import assert_equals_reference, on_ranks, run_steps, train
from reference import INDIVIDUAL_TAU, Reference
from trajectories import (
    GOLDEN_LOSSES,
    LOSSES,
    RUNS,
    TOLERANCE,
    TOTAL_STEPS,
    assert_close,
    batches,
    golden,
    golden_settings,
    random_steps,
    table_tolerance,
)

SIDES = {"image": "im", "text": "tt"}  # names here -> names in the golden files


@cache
def trained_on_golden(loss, precision):
    return on_ranks(RUNS[precision][1], train, golden_settings(loss), 16, precision)


@pytest.mark.parametrize("precision", RUNS)
@pytest.mark.parametrize("loss", GOLDEN_LOSSES)
def test_gradients_follow_the_released_trajectory(loss, precision):
    expected, results, tolerance = golden(loss, precision), trained_on_golden(loss, precision), TOLERANCE[precision]
    for side, key in SIDES.items():
        for t in range(TOTAL_STEPS):
            for rank, result in enumerate(results):
                where = f"{side}, step {t}, rank {rank}"
                assert_close(result[f"grad_{side}"][t], expected[f"gf_{key}"][t, rank], tolerance, f"gradient {where}")
                assert_close(result[f"grad_w_{side}"][t], expected[f"gw_{key}"][t], tolerance, f"of the map {where}")
        assert_close(results[0][f"w_{side}"][-1], expected[f"w_{key}_final"], tolerance, f"final {side} map")


@pytest.mark.parametrize("precision", RUNS)
@pytest.mark.parametrize("loss", GOLDEN_LOSSES)
def test_u_and_tau_follow_the_released_trajectory(loss, precision):
    expected, results = golden(loss, precision), trained_on_golden(loss, precision)
    tolerance, loose = TOLERANCE[precision], table_tolerance(loss, precision)
    for t in range(TOTAL_STEPS):
        for rank, result in enumerate(results):
            where = f"step {t}, rank {rank}"
            for side, key in SIDES.items():
                assert_close(np.exp(result[f"log_u_{side}"][t]), expected[f"u_{key}"][t], loose, f"u {side}, {where}")
                if loss in INDIVIDUAL_TAU:
                    pairs = {"tau": ("tau", tolerance), "tau_m": ("m_grad_tau", loose), "tau_v": ("v_grad_tau", loose)}
                    for name, (golden_name, allowed) in pairs.items():
                        actual = result[f"{name}_{side}"][t]
                        assert_close(actual, expected[f"{golden_name}_{key}"][t], allowed, f"{name} {side}, {where}")
            if loss not in INDIVIDUAL_TAU:
                scale = expected["logit_scale_after"][t]
                assert_close(-np.log(result["temperature"][t]), scale, tolerance, f"logit scale, {where}")


@pytest.mark.parametrize("precision", RUNS)
@pytest.mark.parametrize("loss", GOLDEN_LOSSES)
def test_value_is_the_objective_with_u_in_place_of_g(loss, precision):
    expected, results = golden(loss, precision), trained_on_golden(loss, precision)
    reference = Reference(SimpleNamespace(**golden_settings(loss)))
    for t, (epoch, ids) in enumerate(batches(16)):
        image, text = (expected[f"f_{key}"][t].reshape(16, -1) for key in SIDES.values())
        value = reference.step(image, text, ids, epoch).value
        for rank, result in enumerate(results):
            assert_close(result["value"][t], value, TOLERANCE[precision], f"value, step {t}, rank {rank}")


FIRST_VISITS = [range(12), range(12), range(6, 18), range(12)]  # ids 12..17 are first visited in epoch 1
EQUAL_IDS = [  # equal ids within a rank and, for any number of ranks, on the first and the last
    [5, 1, 5, 2, 3, 4, 6, 7, 8, 9, 10, 5],
    [5, 1, 2, 2, 3, 4, 6, 7, 8, 9, 5, 2],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0],
    [5, 5, 5, 5, 5, 5, 6, 7, 8, 9, 10, 5],
]
# name -> (changes of the settings, ids of the steps, alignment); u is small where aligned, so that eps counts
CASES = {
    "eps 1e-6": ({"eps": 1e-6}, FIRST_VISITS, 0.8),
    "eps of a softmax": ({"eps": 1 / 11}, FIRST_VISITS, 0.8),
    "eps near 1": ({"eps": 0.999, "gradients": "paper"}, EQUAL_IDS, 0.8),
    "unvisited with gamma below 1": ({}, FIRST_VISITS, 0.3),
    "equal ids": ({"eps": 1e-6}, EQUAL_IDS, 0.8),
    "paper gradients": ({"gradients": "paper", "eps": 1e-6}, EQUAL_IDS, 0.8),
    "cosine of tau_lr with a floor": (
        {"tau_lr_schedule": "cosine", "warmup_steps": 1, "total_steps": 5, "lr_min": 0.004},
        FIRST_VISITS,
        0.3,
    ),
    "tau at its lower bound": ({"temperature": 0.02, "tau_lr": 0.8, "rho": 20.0}, FIRST_VISITS, 0.8),
    "tau at its upper bound": ({"temperature": 0.9, "tau_lr": 0.8, "rho": 0.0}, FIRST_VISITS, -0.8),
    "tau around the threshold of its rate": ({"temperature": 0.031, "tau_lr": 0.05, "rho": 20.0}, FIRST_VISITS, 0.3),
}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_loss_equals_the_reference(case, world_size):
    changes, ids, aligned = CASES[case]
    steps = random_steps(ids, epochs=[0, 1, 1, 2], aligned=aligned)
    all_settings = [golden_settings(loss, **changes) for loss in LOSSES]
    all_results = on_ranks(world_size, lambda: [run_steps(settings, steps) for settings in all_settings])
    for which, settings in enumerate(all_settings):
        results = [of_rank[which] for of_rank in all_results]
        assert_equals_reference(settings, steps, results, 1e-10)

"""Problems of the tests: the golden trajectories (golden/golden.json says what each array is) and random steps."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(__file__).parents[1] / "loss" / "golden"
GOLDEN_LOSSES = ("sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3")
LOSSES = (*GOLDEN_LOSSES,)  # with those that the authors' code does not have
EPOCHS, STEPS_PER_EPOCH = 3, 4
TOTAL_STEPS = EPOCHS * STEPS_PER_EPOCH
RUNS = {"float64": ("ws2_f64", 2), "float32": ("ws1_f32", 1)}  # precision -> file name's end, world size
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}  # relative to the array's maximum


@cache
def golden(loss, precision):
    """The arrays of one golden file, as float64 (idx as int64)."""
    with np.load(GOLDEN / f"{loss}_{RUNS[precision][0]}.npz") as file:
        arrays = {name: file[name].astype(np.int64 if name == "idx" else np.float64) for name in file.files}
    for side in ("im", "tt"):
        if f"bound_{side}" in arrays:  # u of v2 in its natural unit
            arrays[f"u_{side}"] = arrays[f"u_{side}"] * np.exp(arrays[f"bound_{side}"])
    return arrays


@cache
def problem():
    """Inputs x, y [N, 8], initial maps w_im0, w_tt0 [8, 8] and the sample orders perms [5, N]."""
    with np.load(GOLDEN / "problem.npz") as file:
        return {name: file[name].astype(np.int64 if name == "perms" else np.float64) for name in file.files}


@cache
def hyperparameters(loss):
    """One entry of golden.json's hyperparameters as a namespace; v1's for a loss without one."""
    known = json.loads((GOLDEN / "golden.json").read_text())["hyperparameters"]
    return SimpleNamespace(**known.get(loss, known["fastclip-v1"]))


def golden_settings(loss, **changes):
    """Fields of FastCLIPConfig that reproduce a golden run, as a dict; `changes` replace some of them."""
    h = hyperparameters(loss)
    fields = {
        "loss": loss,
        "num_samples": h.data_size,
        "epochs": h.epochs,
        "gamma": h.gamma,
        "gamma_schedule": h.gamma_schedule,
        "gamma_decay_epochs": h.gamma_decay_epochs,
        "rho": h.rho,
        "eps": h.fastclip_eps,
        "temperature": h.temperature,
        "tau_lr": h.lr_tau,
        "tau_lr_schedule": h.lr_tau_scheduler,
        "beta1": h.beta1,
        "beta2": h.beta2,
        "adam_eps": h.eps,
        "lr": h.lr,
        "warmup_steps": h.warmup,
        "total_steps": TOTAL_STEPS,
        "lr_min": h.lr_min,
        "gradients": "released",
    }
    return fields | changes


def batches(global_batch):
    """[(epoch, ids [global_batch])] of the whole run: four global batches an epoch."""
    orders = problem()["perms"]
    return [
        (epoch, orders[epoch, start : start + global_batch])
        for epoch in range(EPOCHS)
        for start in range(0, STEPS_PER_EPOCH * global_batch, global_batch)
    ]


def unit(rows):
    """Rows divided by their norm."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_steps(all_ids, epochs, aligned, seed=0, width=8):
    """Random [(image [B, width], text [B, width], ids [B], epoch)]; a text is its image where `aligned` is 1."""
    rng = np.random.default_rng(seed)
    steps = []
    for ids, epoch in zip(all_ids, epochs, strict=True):
        image = unit(rng.standard_normal((len(ids), width)))
        text = unit(aligned * image + (1 - aligned) * unit(rng.standard_normal((len(ids), width))))
        steps.append((image, text, np.array(ids), epoch))
    return steps


def assert_close(actual, expected, tolerance, what):
    """Largest difference at most tolerance times the largest expected magnitude; equal infinities count as equal."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} instead of {expected.shape}"
    infinite = np.isinf(expected)
    assert np.array_equal(actual[infinite], expected[infinite]), f"{what}: infinite at other places"
    finite_actual, finite_expected = actual[~infinite], expected[~infinite]
    if finite_expected.size:
        scale = np.abs(finite_expected).max()
        error = np.abs(finite_actual - finite_expected).max()
        assert error <= tolerance * scale, f"{what}: off by {error / max(scale, 1e-300):.2e} of the maximum {scale:.3g}"


def table_tolerance(loss, precision):
    """Tolerance of u and of tau's moments: the float32 golden runs of v2 and isogclr are this far from float64."""
    loose = precision == "float32" and loss in ("fastclip-v2", "isogclr")
    return 2e-4 if loose else TOLERANCE[precision]

"""The loss against itself in float64 on the CPU, and steps that must not count."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import normalize

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.loss.config import LOSSES
from open_clip_train_fastclip.loss.nonfinite import NonfiniteGuard
from open_clip_train_fastclip.loss.precision import default_products

from ..harness.timing import allow_tf32
from .measurement import Settings, relative, relative_norm, row

STEPS, STEPS_PER_EPOCH = 6, 2
FULLY_CHECKED = ("fastclip-v2", "fastclip-v3")  # a temperature of each kind, in every mode
MODES = {  # features, autocast, largest error of a gradient, which comes in the features' dtype
    "amp_bf16": (torch.float32, torch.bfloat16, 3e-5),
    "float32": (torch.float32, None, 3e-5),
    "bf16": (torch.bfloat16, torch.bfloat16, 5e-3),
    "fp16": (torch.float16, torch.float16, 1e-3),
}
TOLERANCE = 3e-5  # of the value, u and tau
TOLERANCE_OF_MOMENTS = 1e-3  # of tau's optimizer: a sum of gradients that nearly cancel
MOMENTS = ("m", "v", "tau_m_image", "tau_m_text", "tau_v_image", "tau_v_text")
# The arithmetic of the products: how far gradients may be off, by norm, and the factor of the other tolerances.
PRODUCTS = {"exact": (None, 1), "tf32-gradient": (6e-4, 1), "tf32": (2e-3, 60)}


def rows(settings: Settings) -> Iterator[dict]:
    """A row a loss, mode and arithmetic; one for steps with a NaN."""
    if settings.device == "cuda":
        allow_tf32()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # for the runs in float64
    sizes = (32, 16) if settings.small else (512, 512)
    default = default_products(settings.device)
    for loss in LOSSES:
        torch.compiler.reset()  # each loss is compiled anew, and only so many times
        yield against_float64(loss, "amp_bf16", default, *sizes, settings.device)
        if loss in FULLY_CHECKED:
            for mode in MODES:
                if mode != "amp_bf16":
                    yield against_float64(loss, mode, default, *sizes, settings.device)
            for products in PRODUCTS:
                if products != default:
                    yield against_float64(loss, "amp_bf16", products, *sizes, settings.device)
    yield steps_with_nan(settings.device)


def make_features(B: int, d: int, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Unit vectors [B, d] of either modality, each pair near each other."""
    image = normalize(torch.randn(B, d, generator=generator), dim=1)
    text = normalize(image + normalize(torch.randn(B, d, generator=generator), dim=1), dim=1)
    return [image.to(dtype), text.to(dtype)]


def state_of(loss: FastCLIPLoss) -> dict[str, Tensor | float]:
    """Everything that the loss remembers."""
    return {**loss.full_state(), **loss.tau_state()}


def against_float64(name: str, mode: str, products: str, B: int, d: int, device: str) -> dict:
    """STEPS steps with copies of ids in each batch; the largest errors over them."""
    dtype, low_precision, tolerance_of_gradients = MODES[mode]
    fields = {"loss": name, "num_samples": 4 * B, "epochs": 4, "lr": 1e-2, "gamma": 0.3, "total_steps": 2 * STEPS}
    ours = FastCLIPLoss(FastCLIPConfig(**fields, products=products), device=device)
    exact = FastCLIPLoss(FastCLIPConfig(**fields, table_dtype=torch.float64))
    errors, generator = Counter(), torch.Generator().manual_seed(B)
    for step in range(STEPS):
        for loss in (ours, exact):
            loss.start_epoch(step // STEPS_PER_EPOCH)
        ids = torch.randperm(4 * B, generator=generator)[:B]
        ids[1], ids[-1] = ids[0], ids[2]
        features = make_features(B, d, generator, dtype)
        leaves = [f.to(device, copy=True).requires_grad_() for f in features]
        leaves_float64 = [f.double().requires_grad_() for f in features]
        ours.begin_step(ids)
        with torch.autocast(device, low_precision) if low_precision else nullcontext():
            value = ours(*leaves)
        value.backward()
        expected = exact(*leaves_float64, ids)
        expected.backward()
        found = {"value": relative(value, expected)}
        for leaf, leaf_float64 in zip(leaves, leaves_float64, strict=True):
            found["gradient"] = max(found.get("gradient", 0), relative(leaf.grad, leaf_float64.grad))
            found["gradient_norm"] = max(found.get("gradient_norm", 0), relative_norm(leaf.grad, leaf_float64.grad))
        known = state_of(ours)
        found |= {key: relative(known[key], right) for key, right in state_of(exact).items()}
        errors |= Counter(found)
    case = {"loss": name, "mode": mode, "products": products, "B": B, "d": d}
    too_large = beyond_tolerance(errors, tolerance_of_gradients, products)
    figures = {key: errors[key] for key in ("value", "gradient", "gradient_norm")}
    figures["state"] = max((error for key, error in errors.items() if key not in (*figures, *MOMENTS)), default=0.0)
    return row("against float64", case, figures | {"too_large": too_large}, not too_large)


def beyond_tolerance(errors: Counter, of_gradients: float, products: str) -> dict[str, float]:
    """The errors that are larger than they may be."""
    of_norm, factor = PRODUCTS[products]
    too_large = {}
    for name, error in errors.items():
        limit = factor * (TOLERANCE_OF_MOMENTS if name in MOMENTS else TOLERANCE)
        if name == "gradient":
            limit = math.inf if of_norm else of_gradients
        elif name == "gradient_norm":
            limit = max(of_norm, of_gradients) if of_norm else math.inf
        if error > limit:
            too_large[name] = error
    return too_large


def steps_with_nan(device: str) -> dict:
    """A NaN in a feature, and one in a gradient alone: neither weights nor u nor tau move in those steps."""
    torch.manual_seed(0)
    towers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2)).to(device)
    loss = FastCLIPLoss(FastCLIPConfig(loss="fastclip-v3", num_samples=64, epochs=4), device=device)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2)
    guard = NonfiniteGuard(loss, optimizer, towers, None)
    moved = []
    for kind in ("", "", "feature", "gradient", "", ""):
        x = torch.randn(2, 16, 16, device=device)
        if kind == "feature":
            x[0, 3, 2] = math.nan
        before = [tensor.detach().clone() for tensor in (*towers.parameters(), *remembered(loss))]
        loss.begin_step(torch.randperm(64)[:16])
        value = loss(*(normalize(tower(v), dim=1) for tower, v in zip(towers, x, strict=True)))
        optimizer.zero_grad()
        value.backward()
        if kind == "gradient":
            towers[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        guard.end_step()
        after = (*towers.parameters(), *remembered(loss))
        moved.append(not all(torch.equal(a, b) for a, b in zip(after, before, strict=True)))
    expected = [True, True, False, False, True, True]
    skipped = int(loss.skipped_steps)
    figures = {"moved": moved, "skipped_steps": skipped}
    return row("steps with a NaN", {"loss": "fastclip-v3"}, figures, moved == expected and skipped == 2)


def remembered(loss: FastCLIPLoss) -> list[Tensor]:
    """u of all samples, without the spare row, and tau."""
    return [loss.table.rows[:-1], loss.global_tau.log_inv_tau]

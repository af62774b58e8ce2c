"""Drives FastCLIPLoss as a training loop would, on one process or on each rank of a group, and records what it does."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import GLOBAL_TAU, INDIVIDUAL_TAU, Reference
from torch.nn.functional import normalize
from trajectories import TOTAL_STEPS, assert_close, batches, hyperparameters, problem

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def on_ranks(world_size, function, *args):
    """Results of function(*args) on every rank; one rank runs in this process without a process group."""
    return [function(*args)] if world_size == 1 else run_ranks(world_size, function, *args, timeout=120)


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rank_slice(global_batch):
    """The rows of the global batch that are this rank's."""
    rank, world_size = rank_and_world_size()
    rows = global_batch // world_size
    return slice(rank * rows, (rank + 1) * rows)


def make_loss(settings, precision="float64"):
    return FastCLIPLoss(FastCLIPConfig(**settings, table_dtype=DTYPES[precision]))


def state_of(loss):
    """Everything that the loss remembers: full table and state of the global tau, as numpy arrays."""
    state = {name: column.double().numpy().copy() for name, column in loss.full_state().items()}
    return state | {f"global_{name}": np.float64(value) for name, value in loss.tau_state().items()}


def stack(records):
    """List of dicts of arrays -> dict of arrays with one more leading axis."""
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def run_steps(settings, steps, precision="float64", announce=False, loss=None):
    """One step of the loss for each (image [B, d], text [B, d], ids [B], epoch) of `steps`, given features.

    Returns a dict of arrays, first axis the step: value, this rank's gradients, and the state after each step.
    loss: one that has steps behind it; without it a fresh one.
    """
    loss, records, current = loss or make_loss(settings, precision), [], None
    for image, text, ids, epoch in steps:
        if epoch != current:
            loss.start_epoch(epoch)
            current = epoch
        mine = rank_slice(len(ids))
        image, text = (torch.tensor(f[mine], dtype=DTYPES[precision], requires_grad=True) for f in (image, text))
        local_ids = torch.tensor(ids[mine])
        if announce:
            loss.begin_step(local_ids)
            value = loss(image, text)
        else:
            value = loss(image, text, local_ids)
        value.backward()
        record = {"value": value.item(), "grad_image": image.grad.numpy(), "grad_text": text.grad.numpy()}
        records.append(record | state_of(loss) | {"temperature": loss.temperature.item()})
    return stack(records)


def global_gradient(results, name):
    """Gradient of the global objective [steps, B, d] from the ranks' gradients, each K times its part."""
    return np.concatenate([result[name] for result in results], axis=1) / len(results)


def train(settings, global_batch, precision):
    """The golden problem: two linear maps trained by torch.optim.AdamW for three epochs of four steps.

    Gradients of the maps are averaged over the ranks, as DDP does. Returns a dict of arrays, first axis the step.
    """
    dtype, h = DTYPES[precision], hyperparameters(settings["loss"])
    loss, records = make_loss(settings, precision), []
    x, y, w_image, w_text = (torch.tensor(problem()[name], dtype=dtype) for name in ("x", "y", "w_im0", "w_tt0"))
    maps = [w_image.requires_grad_(), w_text.requires_grad_()]
    optimizer = torch.optim.AdamW(maps, lr=h.lr, betas=(h.beta1, h.beta2), eps=h.eps, weight_decay=h.wd)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (
            (t + 1) / h.warmup
            if t < h.warmup
            else 0.5 * (1 + np.cos(np.pi * (t - h.warmup) / (TOTAL_STEPS - h.warmup)))
        ),
    )
    for epoch, ids in batches(global_batch):
        loss.start_epoch(epoch)
        ids = torch.tensor(ids[rank_slice(global_batch)])
        loss.begin_step(ids)
        image, text = normalize(x[ids] @ w_image.T, dim=1), normalize(y[ids] @ w_text.T, dim=1)
        image.retain_grad()
        text.retain_grad()
        value = loss(image, text)
        optimizer.zero_grad()
        value.backward()
        for weight in maps if dist.is_initialized() else ():
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        record = {"value": value.item(), "grad_image": image.grad.numpy(), "grad_text": text.grad.numpy()}
        record |= {"grad_w_image": w_image.grad.numpy().copy(), "grad_w_text": w_text.grad.numpy().copy()}
        optimizer.step()
        schedule.step()
        record |= {"w_image": w_image.detach().numpy().copy(), "w_text": w_text.detach().numpy().copy()}
        records.append(record | state_of(loss) | {"temperature": loss.temperature.item()})
    return stack(records)


def assert_equals_reference(settings, steps, results, tolerance):
    """`results` of run_steps on every rank against the reference, step by step."""
    reference, loss = Reference(SimpleNamespace(**settings)), settings["loss"]
    gradients = {name: global_gradient(results, name) for name in ("grad_image", "grad_text")}
    for t, (image, text, ids, epoch) in enumerate(steps):
        step = reference.step(image, text, ids, epoch)
        where = f"{loss}, step {t}"
        assert_close(gradients["grad_image"][t], step.grad_image, tolerance, f"{where}: image gradient")
        assert_close(gradients["grad_text"][t], step.grad_text, tolerance, f"{where}: text gradient")
        for result in results:
            assert_close(result["value"][t], step.value, tolerance, f"{where}: value")
            for side in ("image", "text"):
                assert_close(result[f"log_u_{side}"][t], reference.log_u[side], tolerance, f"{where}: log u {side}")
                if loss in INDIVIDUAL_TAU:
                    for name, array in (("tau", reference.tau), ("tau_m", reference.tau_m), ("tau_v", reference.tau_v)):
                        assert_close(result[f"{name}_{side}"][t], array[side], tolerance, f"{where}: {name} {side}")
            if loss in GLOBAL_TAU:
                assert_close(result["global_log_inv_tau"][t], reference.log_inv_tau, tolerance, f"{where}: log(1/tau)")
                assert_close(result["global_m"][t], reference.tau_optimizer.m, tolerance, f"{where}: tau's m")
                assert_close(result["global_v"][t], reference.tau_optimizer.v, tolerance, f"{where}: tau's v")
            assert_close(result["temperature"][t], reference.temperature(), tolerance, f"{where}: temperature")

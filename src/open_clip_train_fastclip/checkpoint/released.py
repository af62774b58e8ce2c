"""A checkpoint of the authors' released code, turned into a pair that this package resumes from.

The per-sample tables go over row by row (u is kept as log u), tau and its moments move from the optimizer into the
state. The rows are those of json keys, so the run goes on with --sample-id json-key. Nothing in the released file is
executed.
"""

import glob
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.identity import DataIdentity
from ..errors import UserError
from ..loss.config import FastCLIPConfig
from ..loss.fastclip import FastCLIPLoss
from ..loss.sample_table import SampleTable
from .atomic import atomic_torch_save
from .pt_files import load_pt, why_unreadable, with_note
from .table import save_state, state_dir

NEVER_SEEN = 1e-35  # the released code takes a u below this, inf or nan as that of a sample never seen
RELEASED_LOSSES = {  # of the released code, by what their checkpoints have
    "a constant temperature": ("sogclr", "fastclip-v1"),
    "a learned temperature": ("fastclip-v0", "fastclip-v3"),
    "a temperature for each sample": ("isogclr", "fastclip-v2"),
}
SIDES = {"im": "image", "tt": "text"}
INDIVIDUAL = {"tau": "tau", "m_grad_tau": "tau_m", "v_grad_tau": "tau_v"}  # released name -> column, without the side


def convert(released: Path, checkpoints: Path, loss_name: str | None = None) -> tuple[Path, FastCLIPLoss]:
    """Write the pair; returns the path of the .pt and the loss that holds the state.

    loss_name: the algorithm, needed where the checkpoint does not tell it. Raises UserError; overwrites nothing.
    """
    checkpoint = _load(released)
    _check_keys(checkpoint, released)
    tables = _tables(checkpoint, released)
    group = _temperature_group(checkpoint, released)
    loss_name = _loss_name(loss_name, individual="tau_im" in tables, learned=bool(group["params"]), path=released)
    epoch = checkpoint["epoch"]
    path, state = checkpoints / f"epoch_{epoch}.pt", state_dir(checkpoints, epoch)
    for existing in (path, state):
        if existing.exists():
            raise UserError(f"{existing} exists: name another folder; nothing was changed")

    loss = FastCLIPLoss(FastCLIPConfig(loss=loss_name, num_samples=len(tables["u_im"])))
    _fill(loss.table, tables)
    optimizer = checkpoint["optimizer"]["state"]
    loss.step = max((int(entry["step"]) for entry in optimizer.values()), default=0)
    if loss.global_tau is not None:
        loss.load_tau_state(_tau_state(checkpoint, group))
    loss.recount()
    save_state(
        loss,
        state,
        epoch,
        data=DataIdentity.of_json_keys(loss.table.num_samples),
        settings={},  # the released checkpoint holds none of them
    )
    kept = ("epoch", "name", "state_dict", "scaler")
    ours: dict[str, Any] = {name: checkpoint[name] for name in kept if name in checkpoint}
    ours["optimizer"] = {
        "state": {number: entry for number, entry in optimizer.items() if number not in group["params"]},
        "param_groups": checkpoint["optimizer"]["param_groups"][:-1],
    }
    atomic_torch_save(with_note(ours, loss_name), path)
    return path, loss


def _load(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, read without executing any code that it names."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        checkpoint = load_pt(lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # what the bytes of a foreign file can raise has no end
        reason = why_unreadable(error)
        raise UserError(f"{path} cannot be read ({reason}): name a checkpoint of the released code") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds no dict: name a checkpoint of the released code")
    return checkpoint


def _check_keys(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise UserError unless the checkpoint has what the released code saves."""
    if "u_im" not in checkpoint or "u_tt" not in checkpoint:
        raise UserError(
            f"{path} has no u_im and u_tt, so it is not of the released code's --fastclip: "
            "an OpenCLIP checkpoint needs no conversion, --resume it with --fastclip-fresh-state"
        )
    for name, kind in (("epoch", int), ("state_dict", dict), ("optimizer", dict)):
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path} has no {name}: name a checkpoint that the released training code saved")
    if not {"logit_scale", "module.logit_scale"} & checkpoint["state_dict"].keys():
        raise UserError(f"{path} has no logit_scale among its weights: name a checkpoint of a CLIP model")


def _tables(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The per-sample tables by their released names, [N] each."""
    tables = _columns(checkpoint, ["u_im", "u_tt"], path)
    names = [f"{name}_{side}" for name in (*INDIVIDUAL, "bound") for side in SIDES]
    if "tau_im" in checkpoint:
        tables |= _columns(checkpoint, names, path)
    else:
        tables |= _tables_of_ranks(path, names)
    sizes = {len(table) for table in tables.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"{path}: its tables have {sorted(sizes)} rows, and all should have the same: it is damaged")
    return tables


def _tables_of_ranks(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Tables that some revisions save in a file a rank, each up to date for the samples that this rank has seen."""
    tables: dict[str, Tensor] = {}
    for rank in range(len(list(path.parent.glob(f"{glob.escape(path.stem)}_tau_rank_*.pt")))):
        file = path.with_name(f"{path.stem}_tau_rank_{rank}.pt")
        columns = _columns(_load(file), names, file)
        if not tables:
            tables = columns
        if {len(table) for table in (*tables.values(), *columns.values())} != {len(tables["tau_im"])}:
            raise UserError(f"{file}: its tables differ in size from those of rank 0: it is damaged")
        for name, column in columns.items():
            seen = columns[f"v_grad_tau_{name[-2:]}"] > 0
            tables[name] = torch.where(seen, column, tables[name])
    return tables


def _columns(contents: dict[str, Any], names: list[str], path: Path) -> dict[str, Tensor]:
    """Tables of one number a sample, [N, 1] or [N] in the file, [N] here."""
    columns = {}
    for name in names:
        table = contents.get(name)
        if not isinstance(table, Tensor) or not table.is_floating_point() or table.shape[1:] not in ((), (1,)):
            raise UserError(f"{path}: {name} is missing or is no table of one number a sample: the file is damaged")
        columns[name] = table.reshape(-1)
    return columns


def _temperature_group(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The optimizer's third group: logit_scale, or nothing where it was not learned."""
    groups: list[dict[str, Any]] = checkpoint["optimizer"].get("param_groups", [])
    if len(groups) != 3 or len(groups[2]["params"]) > 1 or "amsgrad" not in groups[0]:
        raise UserError(
            f"{path} has an optimizer that is not the released code's AdamW (with LAMB only the weights can go on): "
            "--resume the file itself with --fastclip-fresh-state"
        )
    return groups[2]


def _loss_name(asked: str | None, *, individual: bool, learned: bool, path: Path) -> str:
    """The algorithm: the one asked for, if the checkpoint can be of it, or the one that the checkpoint tells."""
    temperature = (
        "a temperature for each sample" if individual else f"a {'learned' if learned else 'constant'} temperature"
    )
    possible = RELEASED_LOSSES[temperature]
    if asked is None and individual:
        return "fastclip-v2"
    if asked not in possible:
        raise UserError(f"{path} has {temperature}: say of which algorithm with --loss {' or --loss '.join(possible)}")
    return asked


def _fill(table: SampleTable, released: dict[str, Tensor]) -> None:
    """Copy the released tables into ours; u of v2 is stored as u * exp(-bound)."""
    for side, name in SIDES.items():
        u, log_u = released[f"u_{side}"], table.local(f"log_u_{name}")
        log_u.copy_(u).log_()
        if "bound_im" in released:
            log_u += released[f"bound_{side}"]
            for theirs, ours in INDIVIDUAL.items():
                table.local(f"{ours}_{name}").copy_(released[f"{theirs}_{side}"])
        log_u[~((u >= NEVER_SEEN) & (u < math.inf))] = -math.inf


def _tau_state(checkpoint: dict[str, Any], group: dict[str, Any]) -> dict[str, float]:
    """log(1/tau) from the weights, its AdamW moments from the optimizer."""
    weights = checkpoint["state_dict"]
    logit_scale = weights["module.logit_scale"] if "module.logit_scale" in weights else weights["logit_scale"]
    moments = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0}
    for number in group["params"]:
        moments |= checkpoint["optimizer"]["state"].get(number, {})
    return {
        "log_inv_tau": float(logit_scale),
        "m": float(moments["exp_avg"]),
        "v": float(moments["exp_avg_sq"]),
        "steps": float(moments["step"]),
    }

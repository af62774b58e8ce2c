"""What --resume may load: a checkpoint that fits the model and the loss, and FastCLIP's state beside it."""

import pickle
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import read_index, state_dir
from .durable import numpy_numbers_are_plain, one_line
from .errors import UserError


@dataclass
class ResumedRun:
    """FastCLIP's side of a checkpoint."""

    epoch: int  # epochs done
    folder: Path
    index: dict


def load_checkpoint(pt_load, file_path: str, args, model) -> tuple[ResumedRun | None, dict]:
    """FastCLIP's state (None for OpenCLIP's losses) and the contents of the checkpoint that main() shall load.

    Raises UserError if the file is missing, damaged, of another model, or of a loss that this run cannot continue.
    """
    contents = _read(pt_load, file_path)
    is_training_state = "epoch" in contents
    weights = contents["state_dict"] if is_training_state else contents
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    _check_fits(weights, model, file_path)
    # main() loads into the wrapped model if there are several ranks, whatever the number that wrote the file
    weights = {("module." if args.distributed else "") + name: value for name, value in weights.items()}
    if args.fastclip_fresh_state or not is_training_state:
        return None, weights
    contents["state_dict"] = weights
    if not (args.train_data or args.dataset_type == "synthetic"):
        return None, contents  # evaluation needs the weights alone
    loss, stored = args.loss, contents.get("fastclip", {}).get("loss")
    cure = "take its weights alone with --fastclip-fresh-state (new optimizer, epoch 0)"
    if loss in ("clip", "siglip"):
        if stored:
            raise UserError(f"{file_path} is of a {stored} run, which --loss {loss} cannot continue: {cure}")
        _check_optimizer(contents, model, file_path, cure)
        return None, contents
    if stored != loss:
        whose = f"a {stored}" if stored else "an OpenCLIP"
        raise UserError(f"{file_path} is of {whose} run, without state for --loss {loss}: {cure}")
    epoch = contents["epoch"]
    folder = state_dir(Path(file_path).parent, epoch)
    return ResumedRun(epoch, folder, read_index(folder)), contents


def _read(pt_load, file_path: str) -> dict:
    try:
        with numpy_numbers_are_plain():
            contents = pt_load(file_path, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"--resume {file_path}: there is no such file") from None
    except Exception as error:  # what the bytes of a foreign file can raise has no end
        foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if foreign else one_line(error)
        raise UserError(f"--resume {file_path} is no checkpoint, or cut short ({reason}): name another one") from None
    weights = contents.get("state_dict", contents) if isinstance(contents, dict) else None
    if not isinstance(weights, dict) or not weights or not all(hasattr(v, "shape") for v in weights.values()):
        raise UserError(f"--resume {file_path}: holds no model weights: name a checkpoint of OpenCLIP")
    return contents


def _check_fits(weights: dict, model, file_path: str) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found == expected:
        return
    name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    raise UserError(
        f"--resume {file_path} is of another model: {name} has shape {found.get(name)}, the model of this run "
        f"{expected.get(name)}: give the --model that it was trained with"
    )


def _check_optimizer(contents: dict, model, file_path: str, cure: str) -> None:
    """A frozen temperature is missing from the optimizer, so neither kind of run can continue the other."""
    saved = sum(len(group["params"]) for group in contents["optimizer"]["param_groups"])
    needed = sum(parameter.requires_grad for parameter in model.parameters())
    if saved != needed:
        raise UserError(
            f"{file_path} has an optimizer of {saved} parameters and this run trains {needed} (was the temperature, or "
            f"a tower, frozen in one of them?): use the flags of that run, or {cure}"
        )

"""What --resume may load: a checkpoint that fits the model and the loss, and FastCLIP's state beside it."""

import pickle
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import read_index, state_dir
from .checks import has_training_data, is_fastclip
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
    weights_alone = args.fastclip_fresh_state or not is_training_state
    if weights_alone and has_training_data(args) and (is_fastclip(args) or args.temperature is not None):
        weights["logit_scale"] = model.logit_scale.detach().clone()  # tau starts anew
    # main() loads into the wrapped model if there are several ranks, whatever the number that wrote the file
    wrapped = args.distributed and not args.horovod
    weights = {("module." if wrapped else "") + name: value for name, value in weights.items()}
    if weights_alone:
        return None, weights
    contents["state_dict"] = weights
    if not has_training_data(args):
        return None, contents  # evaluation needs the weights alone
    loss, stored = args.loss, contents.get("fastclip", {}).get("loss")
    cure = "take its weights alone with --fastclip-fresh-state (new optimizer, epoch 0)"
    if "optimizer" not in contents:
        raise UserError(f"{file_path} holds no optimizer, so it cannot be continued: {cure}")
    if not is_fastclip(args):
        if stored:
            raise UserError(f"{file_path} is of a {stored} run, which --loss {loss} cannot continue: {cure}")
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


"""The patches that make the installed OpenCLIP run FastCLIP: where each name is looked up, and why that is enough.

This is the only file that assigns into open_clip_train. Every replacement is a method of hooks.Run that gets the
original as its first argument. A patch is applied only if the flags ask for it: `--loss clip` keeps OpenCLIP's own
loop, loss, model and schedules, and differs in how it reads data and saves, in its checks and in DDP on a CPU; with
--save-every also in the seeds of its data. All seams are checked before anything runs.
"""

import argparse
import builtins
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..errors import UserError
from .run_args import building_flags, has_evaluation_data, has_training_data, is_fastclip, is_resumable
from .settings import MergedParser


def _always(args: argparse.Namespace) -> bool:
    return True


class View:
    """A module with some of its names replaced, for one caller only; everything else passes through."""

    def __init__(self, module: Any, **replaced: Any):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class Patch:
    """One name of OpenCLIP that is bound to a replacement for the length of a run."""

    module: str
    name: str
    parameters: tuple[str, ...]  # what the original must take; empty for a module
    why: str  # why binding the name there is enough
    when: Callable[[argparse.Namespace], Any] = _always
    method: str = ""  # of Run; empty: the same name
    used_by: str = ""  # for a builtin, which the module does not hold itself: its function that looks it up

    @property
    def replacement(self) -> str:
        """Name of the method of Run that replaces the original."""
        return self.method or self.name


MAIN = "open_clip_train.main"
IN_MAIN = "main() looks it up in its own module when it calls it"
PARSER = Patch("open_clip_train.params", "argparse", (), "parse_args() builds its parser from this module global")
PARSE_ARGS = Patch(MAIN, "parse_args", ("args",), IN_MAIN)
PATCHES = (
    Patch(MAIN, "init_distributed_device", ("args",), f"{IN_MAIN}, first after the flags"),
    Patch("open_clip_train.distributed", "torch", (), "init_distributed_device() makes the process group through it",
          method="torch_of_distributed"),
    Patch(MAIN, "torch", (), "main() saves through torch.save and wraps through torch.nn.parallel, found here",
          method="torch_of_main"),
    Patch(MAIN, "setup_logging", ("log_file", "level"), f"{IN_MAIN}, before it logs anything"),
    Patch(MAIN, "open", ("file", "mode"), "main() writes params.txt alone through it, and a global of its module comes "
          "before a builtin", method="open_in_main", used_by="main"),
    Patch(MAIN, "get_latest_checkpoint", ("path", "remote"), f"{IN_MAIN}, for --resume latest"),
    Patch(MAIN, "pt_load", ("file_path", "map_location"), f"{IN_MAIN}, for --resume"),
    Patch(MAIN, "copy_codebase", ("args",), IN_MAIN),
    Patch(MAIN, "get_data", ("args", "preprocess_fns", "epoch", "tokenizer"), IN_MAIN),
    Patch("open_clip_train.data", "CsvDataset", ("input_filename", "transforms", "img_key", "caption_key", "sep"),
          "get_csv_dataset() looks it up in its own module, for training and evaluation", method="csv_dataset"),
    Patch(MAIN, "create_model_and_transforms", ("model_name",), f"{IN_MAIN}, before DDP and the optimizer",
          lambda args: is_fastclip(args) or args.freeze_temperature or args.temperature is not None or args.resume
          or building_flags(args) or args.lock_image or args.lock_text),
    Patch(MAIN, "cosine_lr", ("optimizer", "base_lr", "warmup_length", "steps"), IN_MAIN,
          lambda args: args.lr_min > 0 or args.full_epochs != args.epochs),
    Patch(MAIN, "const_lr", ("optimizer", "base_lr", "warmup_length", "steps"), IN_MAIN,
          lambda args: args.full_epochs != args.epochs),
    Patch(MAIN, "const_lr_cooldown", ("optimizer", "base_lr", "warmup_length", "steps"), IN_MAIN,
          lambda args: args.full_epochs != args.epochs, method="const_lr"),
    Patch(MAIN, "create_loss", ("args",), f"{IN_MAIN}, once, after a resume's checkpoint was loaded",
          lambda args: is_fastclip(args) or args.profile),
    Patch(MAIN, "evaluate", ("model", "data", "epoch", "args"), IN_MAIN,
          has_evaluation_data),
    Patch("open_clip_train.zero_shot", "accuracy", ("output", "target", "topk"),
          "run(), which measures zero-shot ImageNet, looks it up in its own module",
          lambda args: args.imagenet_val or args.imagenet_v2),
    Patch(MAIN, "train_one_epoch", ("model", "data", "loss", "epoch", "optimizer", "scaler", "tb_writer"), IN_MAIN,
          has_training_data),
    Patch("open_clip_train.train", "enumerate", ("iterable",), "train_one_epoch() counts its batches with it, and a "
          "global of its module comes before a builtin", is_resumable, used_by="train_one_epoch"),
)  # fmt: skip


# Called, not replaced: by usable.py and pipeline.py, which group the files of a tar as OpenCLIP does, and by resume.py.
USED = (
    Patch(MAIN, "natural_key", ("string_",), ""),
    Patch("open_clip_train.data", "group_by_keys_nothrow", ("data", "handler"), ""),
)


def check_seams() -> None:
    """Raise UserError, naming the symbol, if the installed OpenCLIP lacks a name that we replace or call."""
    for patch in (PARSER, PARSE_ARGS, *PATCHES, *USED):
        try:
            original = _original(patch)
            taken = inspect.signature(original).parameters if patch.parameters else {}
        except (ImportError, AttributeError):
            original = None
        if original is None or not set(patch.parameters) <= set(taken):
            version = importlib.metadata.version("open_clip_torch")
            raise UserError(
                f"open_clip_torch {version} has no {patch.module}.{patch.name}({', '.join(patch.parameters)}) as this "
                "package needs it: install 'open_clip_torch[training]>=3.3,<4'",
                on_all_ranks=True,
            )


def _original(patch: Patch) -> Any:
    """What the patched name stands for. Raises ImportError or AttributeError if OpenCLIP has it no more."""
    module = importlib.import_module(patch.module)
    if not patch.used_by:
        return getattr(module, patch.name)
    if patch.name not in getattr(module, patch.used_by).__code__.co_names:
        raise AttributeError(patch.name)
    return getattr(builtins, patch.name)


_active = False  # the marker against applying twice


@contextmanager
def applied(run: Any) -> Iterator[None]:
    """Apply the patches around a call of OpenCLIP's main() and take them back afterwards.

    `run` has a method for each patched name. The patches beyond the parser are applied once the flags are known.
    """
    originals: list[tuple[Any, Patch, Any]] = []

    def bind(patch: Patch, replacement: Any = None) -> None:
        module, original = importlib.import_module(patch.module), _original(patch)
        replacement = replacement or functools.partial(getattr(run, patch.replacement), original)
        if not patch.parameters:
            replacement = replacement()  # a module: the method makes its stand-in
        originals.append((module, patch, original))
        setattr(module, patch.name, replacement)

    def parse_args(argv: list[str]) -> argparse.Namespace:
        args: argparse.Namespace = run.parse_args(stock_parse_args, argv)
        for patch in PATCHES:
            if patch.when(args):
                bind(patch)
        return args

    global _active
    if _active:
        raise RuntimeError("OpenCLIP is patched already: one run at a time in a process")
    check_seams()
    stock_parse_args = importlib.import_module(MAIN).parse_args
    _active = True
    try:
        bind(PARSER, lambda: SimpleNamespace(ArgumentParser=MergedParser))
        bind(PARSE_ARGS, parse_args)
        yield
    finally:
        for module, patch, original in reversed(originals):
            if patch.used_by:
                delattr(module, patch.name)
            else:
                setattr(module, patch.name, original)
        _active = False

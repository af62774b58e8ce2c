"""The house: who may import whom, third parties included, and how long a file and a function may be."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "open_clip_train_fastclip"
MAY_IMPORT = {  # a room (or a file at the top): those of the package, then third parties
    "errors": set(),
    "ranks": {"errors", "torch"},
    "loss": {"errors", "ranks", "torch"},
    "data": {"errors", "ranks", "torch", "numpy", "webdataset", "tqdm", "PIL"},
    "checkpoint": {"errors", "ranks", "loss", "data.identity", "torch", "numpy", "safetensors"},
    "training": {"errors", "ranks", "loss", "data", "checkpoint", "torch", "tqdm"},
    "openclip": {
        *{"errors", "ranks", "loss", "data", "checkpoint", "training"},
        *{"open_clip", "open_clip_train", "timm", "torch", "torchvision", "webdataset", "pandas", "wandb"},
    },
}  # fmt: skip
COMMANDS = ("__init__", "__main__", "main", "preflight", "convert", "shard_sizes")
MAY_IMPORT |= dict.fromkeys(COMMANDS, {"errors", "loss", "checkpoint", "training", "openclip", "main", "torch"})
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """What a file imports: names of the package as data.identity.DataIdentity, third parties by their own names."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join(filter(None, [*base, node.module, alias.name])) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = MAY_IMPORT[room]
    for name in imports(path):
        first, *rest = name.split(".")
        is_free = first == room or first in sys.stdlib_module_names
        assert is_free or {first, ".".join([first, *rest[:1]])} & allowed, f"{path} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    assert path.read_text().count("\n") <= 350
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, f"{path}: {node.name}"

"""The patch layer's promises: every seam is checked, applied only when asked for, once, and taken back."""

import inspect

import open_clip_train.main
import open_clip_train.params
import pytest
from cli import TINY, run_cli

from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.openclip import patches
from open_clip_train_fastclip.openclip.hooks import Run

ALL = (patches.PARSER, patches.PARSE_ARGS, *patches.PATCHES)


def bound():
    """What the modules hold under the patched names; None: a builtin that they look up."""
    return {(p.module, p.name): getattr(inspect.importlib.import_module(p.module), p.name, None) for p in ALL}


def flags(*extra):
    return [*TINY, "--dataset-type", "synthetic", "--train-num-samples", "16", *extra]


@pytest.mark.parametrize("patch", ALL, ids=lambda p: p.name)
def test_every_patch_says_why_and_has_a_replacement(patch):
    assert len(patch.why) > 10
    assert patch in (patches.PARSER,) or callable(getattr(Run, patch.replacement))


def test_clip_keeps_openclips_own_functions():
    own = bound()
    with patches.applied(Run()):
        open_clip_train.main.parse_args(flags("--loss", "clip"))
        # train_one_epoch is wrapped: what it leaves is looked through before it is saved
        for name in ("create_loss", "create_model_and_transforms", "cosine_lr", "evaluate"):
            assert getattr(open_clip_train.main, name) is own["open_clip_train.main", name], name


def test_patches_are_taken_back_even_after_an_error():
    own = bound()
    with pytest.raises(RuntimeError, match="on purpose"), patches.applied(Run()):
        open_clip_train.main.parse_args(flags("--loss", "fastclip-v3"))
        assert bound() != own
        raise RuntimeError("on purpose")
    assert bound() == own


def test_applying_twice_is_refused():
    with patches.applied(Run()):
        open_clip_train.main.parse_args(flags("--loss", "fastclip-v3"))
        with pytest.raises(RuntimeError, match="already"), patches.applied(Run()):
            open_clip_train.main.parse_args(flags("--loss", "fastclip-v3"))


@pytest.mark.parametrize("patch", (*ALL, *patches.USED), ids=lambda p: p.name)
def test_a_missing_seam_is_named(patch, monkeypatch):
    if patch.used_by:
        monkeypatch.setattr(f"{patch.module}.{patch.used_by}", lambda model, data: None)
    else:
        monkeypatch.delattr(f"{patch.module}.{patch.name}")
    with pytest.raises(UserError, match=rf"{patch.module}\.{patch.name}.*install"):
        patches.check_seams()


def test_a_changed_seam_is_named(monkeypatch):
    monkeypatch.setattr(open_clip_train.main, "train_one_epoch", lambda task, loader: None)
    with pytest.raises(UserError, match="train_one_epoch"):
        patches.check_seams()


def test_a_missing_seam_ends_the_command_in_one_line(monkeypatch, tmp_path):
    monkeypatch.delattr(open_clip_train.main, "cosine_lr")
    run = run_cli(flags(), tmp_path)
    assert run.codes == [2] and "cosine_lr" in run.output[0] and "Traceback" not in run.output[0], run

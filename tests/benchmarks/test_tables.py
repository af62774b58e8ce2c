"""The tables: which of their rows are one run, and that the stored runs are found."""

from dataclasses import replace

import pytest

from benchmarks import tables
from benchmarks.experiments import local
from benchmarks.experiments.store import Store, key_of
from benchmarks.experiments.table import NOISY
from benchmarks.tables.settings import CLIP
from open_clip_train_fastclip.errors import UserError


def test_the_same_settings_are_the_same_run_whichever_table_asks():
    keys = {
        name: {row.loss: key_of(local.settings_of(row, 0)) for row in tables.load(name).rows if not row.flags}
        for name in ("temperature", "gradients", "memory", "laion400m")
    }
    assert keys["temperature"]["fastclip-v3"] == keys["gradients"]["fastclip-v3"] == keys["laion400m"]["fastclip-v3"]
    assert keys["temperature"]["clip"] == keys["memory"]["clip"]
    scaling = {row.name: key_of(local.settings_of(row, 0)) for row in tables.load("scaling").rows}
    assert scaling["v3-x1"] == keys["laion400m"]["fastclip-v3"] and len(set(scaling.values())) == 12


@pytest.mark.parametrize(
    "change",
    [{"local": {"--lr": 2e-3}}, {"batch": 64}, {"epochs": 2}, {"ranks": 2}, {"data": replace(NOISY, seed=1)}],
)
def test_other_settings_are_another_run(change):
    keys = {key_of(local.settings_of(row, seed)) for row in (CLIP, replace(CLIP, **change)) for seed in (0, 1)}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("table", "name", "seed", "key"),
    [
        ("temperature", "v3", 0, "069f07f70441"),
        ("optimizers", "v3-sgd", 0, "039e097e6474"),
        ("scaling", "clip-x8", 1, "00eb941000d3"),
        ("map", "v3-partial", 0, "4e743dd0e8db"),
        ("step_time", "v1-step-x2", 0, "18f4dcf6c7df"),
    ],
)
def test_the_stored_runs_are_still_found(table, name, seed, key):
    row = next(row for row in tables.load(table).rows if row.name == name)
    assert key_of(local.settings_of(row, seed)) == key and Store().is_done(key)


@pytest.mark.parametrize(
    ("table", "name", "eps"),
    [
        ("map", "v3-partial", ["1e-14"]),
        ("eps", "eps-noisy-fastclip-v3-0.001", ["0.001"]),
        ("map", "clip-partial", []),
        ("quickstart", "fastclip-v3", []),  # trains with the flags' defaults of today
    ],
)
def test_a_row_that_names_no_eps_has_that_of_the_first_stored_runs(table, name, eps):
    row = next(row for row in tables.load(table).rows if row.name == name)
    words = local.make_run(row, 0, "").arguments
    assert [value for flag, value in zip(words, words[1:], strict=False) if flag == "--fastclip-eps"] == eps


def test_the_quickstart_does_not_show_a_run_of_other_defaults():
    row = next(row for row in tables.load("quickstart").rows if row.loss == "fastclip-v3")
    assert local.settings_of(row, 0)["flags"]["--fastclip-eps"] == 1e-4


def test_unknown_table_is_refused():
    with pytest.raises(UserError, match="there is no table"):
        tables.load("no_such")

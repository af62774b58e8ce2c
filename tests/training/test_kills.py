"""Runs killed at random moments go on as if nothing had happened; `make soak` does the same twenty times."""

import random

import pytest
from kills import HOW, kill_and_resume, undisturbed


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("kills"), "fastclip-v3")


@pytest.mark.parametrize("how", HOW)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(how, reference, tmp_path):
    kill = kill_and_resume(reference, tmp_path, how, random.Random(how))
    assert kill.equal, kill

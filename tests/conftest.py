"""Tests run on one core per process: ranks are processes, and a thread pool for each would make them slower."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402  (reads the variable when it is imported)

torch.set_num_threads(1)


@pytest.fixture
def as_rank(monkeypatch):
    """A function that makes this process one of several for what asks the environment."""

    def set_rank(rank, world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    return set_rank

"""Tests run on one core per process: ranks are processes, and a thread pool for each would make them slower."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402  (reads the variable when it is imported)

torch.set_num_threads(1)

"""The check on a GPU: its parts, each in a process of its own, their rows, and what changed since the last ones."""

import os

# Read by torch when it is asked for GPUs: without it the question begins CUDA, which no fork can use then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

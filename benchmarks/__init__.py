"""Data, runs and tables that show what the losses do."""

import os

# Read by torch when it is asked for GPUs: without it the question begins CUDA, which the forks of a measurement could
# not use any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

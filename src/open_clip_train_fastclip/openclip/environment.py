"""What the environment says of the run's processes, checked before OpenCLIP and webdataset read it.

OpenCLIP takes WORLD_SIZE (of torchrun) or else SLURM_NTASKS for the number of processes, and waits for the others.
In SLURM that number is also set where one process runs alone: in the shell of salloc and of sbatch, whose
SLURM_STEP_NUM_TASKS is missing; in an interactive step, whose SLURM_STEP_NUM_TASKS is 1; and in the shell of
`srun --pty`, where it is equal, but the shell, and not we, is the task, and the terminal is ours. Tasks of srun have no
terminal as their input.
"""

import argparse
import os
import sys

import torch.distributed as dist

from ..errors import UserError
from .run_args import is_webdataset

NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "MASTER_PORT")


def check_environment(args: argparse.Namespace) -> None:
    """Raise UserError for variables that do not fit together, would be waited on for ever, or change what is read."""
    for name in NUMBERS:
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise UserError(
                f"{name} is {value!r} in the environment, where a launcher puts a number: unset it, or start the run "
                "with torchrun or srun",
                on_all_ranks=True,
            )
    _check_workers(args)
    if not args.horovod and not dist.is_initialized():
        _check_processes(args.dist_url)


def _check_workers(args: argparse.Namespace) -> None:
    worker, workers = os.environ.get("WORKER"), os.environ.get("NUM_WORKERS")
    data = filter(None, (args.train_data, args.val_data))
    if worker is not None and workers is not None and any(is_webdataset(path, args.dataset_type) for path in data):
        raise UserError(
            f"WORKER is {worker!r} and NUM_WORKERS {workers!r} in the environment: webdataset takes them for the "
            "numbers of a data worker, and every process would read the same part of the shards: unset them",
            on_all_ranks=True,
        )


def _check_processes(dist_url: str | None) -> None:
    rank, world_size, tasks = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"))
    if world_size is not None and rank is not None and int(rank) >= int(world_size):
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size} in the environment: unset both, or start the run with torchrun"
        )
    if world_size is None and int(tasks or 1) > 1 and not _is_task_of(str(tasks)):
        raise UserError(
            f"SLURM_NTASKS is {tasks}, and this process is no task of srun, so it would wait for others that never "
            "come: start the run with srun, or set SLURM_NTASKS=1 to train with one process",
            on_all_ranks=True,
        )
    if int(world_size or tasks or 1) == 1 or (dist_url or "env://") != "env://":
        return
    if not {"RANK", "PMI_RANK", "SLURM_PROCID"} & set(os.environ):
        raise UserError(
            f"WORLD_SIZE is {world_size} in the environment and RANK is missing: start the run with torchrun, or unset "
            "WORLD_SIZE to train with one process",
            on_all_ranks=True,
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"{name} is missing in the environment, where {world_size or tasks} processes find each other by it: "
                "export MASTER_ADDR, the first host, and MASTER_PORT, a free port, as scripts/slurm/fastclip_32gpu.sh "
                "does, or start the run with torchrun",
                on_all_ranks=True,
            )


def _is_task_of(tasks: str) -> bool:
    """Whether srun has started this process, itself or through a script, as one of so many."""
    if os.environ.get("SLURM_STEP_NUM_TASKS") != tasks:
        return False
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    return os.environ.get("SLURM_TASK_PID") == str(os.getpid()) or not is_terminal


def rank_of_process() -> int:
    """The rank that the environment gives this process; 0 where it says nothing sensible."""
    names = ("RANK", "SLURM_PROCID") if os.environ.get("WORLD_SIZE") else ("SLURM_PROCID",)
    value = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(value) if value.isdecimal() else 0

"""Calls a function in processes of their own: one for a measurement of memory, several as ranks of a gloo group."""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist


def in_processes(count: int, function: Callable, *args, device: str = "cpu") -> list:
    """Results of function(*args) in `count` forked processes, in rank order; with more than one, in a group.

    The group is gloo's; on device "cuda" NCCL's, each rank with a GPU of its own. The environment is torchrun's. Raises
    RuntimeError with the traceback of the process that failed first; the others are then ended. Call it before anything
    runs on a GPU: a fork cannot use one that its parent used.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(count):
            reader, writer = context.Pipe(duplex=False)
            own = (rank, count, device, Path(folder), writer)
            process = context.Process(target=_rank, args=(*own, function, args))  # no daemon: it may have data workers
            process.start()
            writer.close()
            pipes.append(reader)
            processes.append(process)
        try:
            return _results(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def existing_group() -> Iterator[None]:
    """Let OpenCLIP's main() use the process group that is there already, in the place of one of its own."""
    make_group = dist.init_process_group

    def make_first_group(*args, **kwargs):
        if not dist.is_initialized():
            make_group(*args, **kwargs)

    with patch.object(dist, "init_process_group", make_first_group):
        yield


def _rank(
    rank: int, count: int, device: str, folder: Path, writer: Connection, function: Callable, args: tuple
) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, for calls that OpenCLIP and we need
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        if count > 1:
            torch.set_num_threads(1)
            if device == "cuda":
                torch.cuda.set_device(rank)
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
        writer.send((True, function(*args)))
        if count > 1:
            dist.barrier()  # no rank takes its sockets away while another is still in a collective
    except BaseException:
        writer.send((False, f"rank {rank} of {count}:\n{traceback.format_exc()}"))


def _results(pipes: list[Connection]) -> list:
    results = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for i, pipe in enumerate(pipes) if i not in results]):
            rank = pipes.index(pipe)
            try:
                ok, results[rank] = pipe.recv()
            except EOFError:
                raise RuntimeError(f"process {rank} of {len(pipes)} was killed: was there enough memory?") from None
            if not ok:
                raise RuntimeError(results[rank])
    return [results[rank] for rank in range(len(pipes))]

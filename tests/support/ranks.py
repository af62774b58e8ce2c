"""run_ranks: a function on several ranks of a gloo process group, as forked processes of the test process."""

import faulthandler
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRACE = 2.0  # seconds that the other ranks get to end by themselves after one has failed


class RankTraceback(Exception):
    """The traceback of a rank as text: the cause of the exception that run_ranks raises."""

    def __str__(self):
        return self.args[0]


def run_ranks(world_size, function, *args, timeout=60):
    """Call function(*args) on world_size ranks and return their results as a list in rank order.

    Each rank is a fork, so function may be a closure and modules are not imported again; what it returns must be
    picklable. Rank and world size come from torch.distributed. An exception in a rank is raised here, its cause being
    the rank's traceback; ranks that are not done after `timeout` seconds are killed and TimeoutError is raised with
    their stacks.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout, function, args), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, folder, timeout)
            _raise_first_error(ranks, folder, timeout)
            return [pickle.loads(_result_file(folder, rank).read_bytes()) for rank in range(world_size)]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _result_file(folder, rank):
    return folder / f"result-{rank}"


def _error_file(folder, rank):
    return folder / f"error-{rank}"


def _rank(rank, world_size, folder, timeout, function, args):
    torch.set_num_threads(1)
    with open(folder / f"stacks-{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(max(0.1, timeout - 0.5), file=stacks)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            result = pickle.dumps(function(*args))
            _result_file(folder, rank).write_bytes(result)
            dist.barrier()  # no rank takes its sockets away while another is still in a collective
            dist.destroy_process_group()
        except BaseException as error:  # a SystemExit of a rank is a result to report too
            _write_error(folder, rank, error)
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _write_error(folder, rank, error):
    text = f"rank {rank}:\n" + "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps((time.monotonic(), error, text))
        pickle.loads(pickled)
    except Exception:  # an exception that cannot be pickled: its text is enough
        pickled = pickle.dumps((time.monotonic(), RuntimeError(f"{type(error).__name__}: {error}"), text))
    partial = folder / f"partial-{rank}"
    partial.write_bytes(pickled)
    partial.rename(_error_file(folder, rank))


def _wait(ranks, folder, timeout):
    deadline = time.monotonic() + timeout
    running = list(ranks)
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running], timeout=deadline - time.monotonic())
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in ranks if process not in running):
            deadline = min(deadline, time.monotonic() + GRACE)


def _raise_first_error(ranks, folder, timeout):
    errors = [pickle.loads(file.read_bytes()) for file in folder.glob("error-*")]
    if errors:  # the others' errors are mostly "connection closed by peer"
        _, error, text = min(errors, key=lambda entry: entry[0])
        raise error from RankTraceback(text)
    for rank, process in enumerate(ranks):
        if process.exitcode is None:
            stacks = "\n".join(file.read_text() for file in sorted(folder.glob("stacks-*")))
            raise TimeoutError(f"rank {rank} was not done after {timeout} seconds\n{stacks}")
        if process.exitcode or not _result_file(folder, rank).exists():
            raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}")

"""A process that loads data and is killed, by the system when the memory is full, ends every rank with one line."""

import multiprocessing
import os
import signal

import open_clip_train.main
import pytest
import torch.distributed as dist
from cli import INSTALLED_MODEL, TINY, run_forked
from make_data import make_csv, make_shards

from open_clip_train_fastclip.main import main


def train_and_lose_a_worker(argv):
    """Our command line; before its third batch the last rank loses a data worker."""
    create, batches = open_clip_train.main.create_model_and_transforms, []

    def create_model_and_transforms(model_name, *args, **kwargs):
        model, *transforms = create(model_name, *args, **kwargs)

        def kill(module, inputs):
            batches.append(None)
            is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
            if len(batches) == 3 and is_last:
                workers = [child for child in multiprocessing.active_children() if child._parent_pid == os.getpid()]
                os.kill(workers[0].pid, signal.SIGKILL)

        model.register_forward_pre_hook(kill)
        return model, *transforms

    open_clip_train.main.create_model_and_transforms = create_model_and_transforms
    return main(argv)


@pytest.mark.parametrize("kind", ["rows", "shards"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_worker_ends_every_rank(ranks, kind, tmp_path):
    if kind == "rows":
        (tmp_path / "data").mkdir()
        data = make_csv(tmp_path / "data", rows=320)
    else:
        data = make_shards(tmp_path / "data", shards=4, per_shard=80)
    # steps of the larger model last long enough for the loss to be seen in one of them
    flags = [*TINY, *INSTALLED_MODEL, "--loss", "fastclip-v3", "--train-data", data, "--workers", "2"]
    flags += ["--logs", str(tmp_path / "logs")]
    run = run_forked(train_and_lose_a_worker, (flags,), tmp_path / "out", ranks=ranks, timeout=60)
    # The other data workers may hand over a batch just then, of which Python's resource_sharer prints a traceback.
    tracebacks = [block for block in str(run).split("Traceback")[1:] if "resource_sharer" not in block]
    assert all(code > 0 for code in run.codes) and not tracebacks, run
    complaints = [[line for line in output.splitlines() if "fastclip: error" in line] for output in run.output]
    assert all(len(lines) == 1 for lines in complaints), run
    assert "a process that loads data was killed" in complaints[-1][0] and "--workers" in complaints[-1][0], run
    assert ranks == 1 or "another rank ended" in complaints[0][0], run

"""The harness of the multi-rank tests: results in order, errors with the rank's traceback, no endless wait."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def sum_of_ranks(offset):
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def test_results_come_in_rank_order():
    assert run_ranks(3, sum_of_ranks, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_an_error_in_one_rank_is_raised_though_the_others_wait_for_it():
    def fails_on_rank_1():
        if dist.get_rank() == 1:
            raise KeyError("only here")
        dist.barrier()

    with pytest.raises(KeyError, match="only here") as caught:
        run_ranks(2, fails_on_rank_1)
    assert "fails_on_rank_1" in str(caught.value.__cause__)
    assert "rank 1" in str(caught.value.__cause__)


def test_a_hang_ends_at_the_time_out_and_names_where():
    def hangs_on_rank_0():
        if dist.get_rank() == 0:
            time.sleep(1000)

    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="hangs_on_rank_0"):
        run_ranks(2, hangs_on_rank_0, timeout=1.5)
    assert time.monotonic() - begin < 10


def test_a_rank_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_ranks(1, os._exit, 7)

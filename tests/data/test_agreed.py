"""An error of one rank in place of a batch ends all of them, whichever batch it is; without errors nothing moves."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cli import TINY, run_cli
from make_data import make_csv, make_shards
from ranks import run_ranks
from torch.utils.data import DataLoader, Dataset

from open_clip_train_fastclip.data.agreed import AgreedLoader
from open_clip_train_fastclip.errors import UserError, user_message

BATCHES = 6


class Rows(Dataset):
    """Rows that draw from this process's generators, unless workers make them; on rank 1 one of them may be bad."""

    def __init__(self, workers, bad):
        self.workers, self.bad = workers, bad

    def __len__(self):
        return 2 * BATCHES

    def __getitem__(self, row):
        if row == self.bad and dist.is_initialized() and dist.get_rank() == 1:
            raise UserError(f"row {row} is bad")
        return row, torch.ones(()) if self.workers else torch.rand(())


def loader_of(workers, bad=None, wrapped=True):
    """Ranks of run_ranks may have no processes of their own, so that workers are only said to be there."""
    loader = DataLoader(Rows(workers, bad), batch_size=2)
    loader.num_batches, loader.num_samples = BATCHES, 2 * BATCHES
    return AgreedLoader(loader, workers, timedelta(seconds=30)) if wrapped else loader


def drawn_between_steps(loader):
    """The batches, and what a step would draw from the generators behind each."""
    torch.manual_seed(3)
    return [(rows.tolist(), draws.tolist(), torch.rand(()).item()) for rows, draws in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_draws_are_the_loaders_own(workers):
    expected = drawn_between_steps(loader_of(workers, wrapped=False))
    assert len(expected) == BATCHES and drawn_between_steps(loader_of(workers)) == expected
    assert run_ranks(2, lambda: drawn_between_steps(loader_of(workers))) == [expected] * 2


@pytest.mark.parametrize("bad", [0, 5, 2 * BATCHES - 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_one_rank_is_raised_on_all(workers, bad):
    def draw():
        batches = 0
        with pytest.raises(UserError) as error:
            for _ in loader_of(workers, bad):
                batches += 1
                dist.all_reduce(torch.ones(1))  # the step, in which nobody may be left alone
        assert error.value.on_all_ranks
        return batches, user_message(error.value)

    assert run_ranks(2, draw) == [(bad // 2, f"row {bad} is bad")] * 2


@pytest.mark.parametrize(("loss", "workers"), [("clip", 0), ("siglip", 2), ("fastclip-v3", 2)])
def test_a_bad_row_of_one_rank_ends_all(loss, workers, tmp_path):
    data = make_csv(tmp_path, rows=32)
    (tmp_path / "31.png").write_bytes(b"x")
    flags = ["--loss", loss, "--train-data", data, "--logs", tmp_path, "--batch-size", 4, "--workers", workers]
    ended_together(run_cli([*TINY, *flags], tmp_path / "out", ranks=2, timeout=60), "row 32 of ", "31.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_key_late_in_a_shard_of_one_rank_ends_all(workers, tmp_path):
    data = make_shards(tmp_path / "data", shards=2, per_shard=64)
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", data, "--sample-id", "json-key", "--logs", tmp_path]
    flags += ["--data-size", 127, "--train-num-samples", 128, "--workers", workers]
    ended_together(run_cli(flags, tmp_path / "out", ranks=2, timeout=60), "its key 127 does not fit a table of 127")


def ended_together(run, *words):
    lines = [line for output in run.output for line in output.splitlines() if "fastclip: error" in line]
    assert run.codes == [2, 2] and "Traceback" not in str(run), run
    assert len(lines) == 1 and all(word in lines[0] for word in words), run

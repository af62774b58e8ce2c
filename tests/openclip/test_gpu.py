"""What a run on a GPU asks of torch, by fakes of torch.cuda: every question is about the GPU that the model is on."""

from argparse import Namespace

import pytest
import torch

from open_clip_train_fastclip.data.rng import rng_state, set_rng_state
from open_clip_train_fastclip.openclip import hooks
from open_clip_train_fastclip.training.batches import ResumableBatches
from open_clip_train_fastclip.training.progress import LoopSettings

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def generators(monkeypatch):
    """The states of two GPUs' generators, by device; the first GPU is the current one."""
    states = {FIRST: torch.tensor([10]), SECOND: torch.tensor([11])}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device=FIRST: states[device])
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device=FIRST: states.update({device: state}))
    return states


def test_the_generator_is_that_of_the_training_gpu(generators):
    saved = rng_state(SECOND)
    assert saved["cuda"].item() == 11
    generators[SECOND] = torch.tensor([99])
    set_rng_state(saved, SECOND)
    assert (generators[FIRST].item(), generators[SECOND].item()) == (10, 11)


def test_without_a_gpu_in_training_none_is_asked(generators):
    saved = rng_state(SECOND)
    assert "cuda" not in rng_state(torch.device("cpu"))
    generators[SECOND] = torch.tensor([99])
    set_rng_state(saved, torch.device("cpu"))
    assert generators[SECOND].item() == 99


def test_a_resumed_epoch_puts_the_generator_back_into_the_training_gpu(generators):
    class Loader(list):
        num_batches, num_samples = 1, 4

    loop = LoopSettings(rank=0, world_size=1, batch_size=4, accum_freq=1, epochs=1, seed=0, device=SECOND)
    batches = ResumableBatches(Loader(["batch"]), loop, 0, None, None)
    batches.resume(0, {**rng_state(torch.device("cpu")), "cuda": torch.tensor([42])})
    assert list(batches._remaining()) == ["batch"]
    assert (generators[FIRST].item(), generators[SECOND].item()) == (10, 42)


@pytest.mark.parametrize("name, current", [("cuda:1", [SECOND]), ("cuda", []), ("cpu", [])])
def test_the_training_gpu_becomes_the_current_one(name, current, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr(hooks.checks, "check_before_building", lambda args: None)
    run = hooks.Run()
    args = run.args = Namespace(
        device=name, horovod=False, dist_url=None, train_data=None, val_data=None, imagenet_val=None, imagenet_v2=None,
        resume=None, save_most_recent=False, remote_sync=None, name="x", logs=str(tmp_path), rank=0,
    )  # fmt: skip
    assert run.init_distributed_device(lambda args: torch.device(name), args) == torch.device(name)
    assert chosen == current

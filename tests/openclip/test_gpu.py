"""What a run on a GPU asks of torch, by fakes of torch.cuda: every question is about the GPU that the model is on."""

from argparse import Namespace

import pytest
import torch
from cli import TINY, run_forked
from loaders import numbered_loader, numbered_rows, openclip_args, preprocess, stock_loader, tokenizer
from make_data import make_csv, make_shards
from open_clip_train import data as openclip_data
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from open_clip_train_fastclip.data.rng import rng_state, set_rng_state
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.openclip import hooks
from open_clip_train_fastclip.openclip.files import pin_batches
from open_clip_train_fastclip.training import profiling
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


def shards_of(folder):
    return stock_loader(make_shards(folder, shards=1, per_shard=8), train_num_samples=8)


def table_of(folder):
    args = openclip_args(make_csv(folder, rows=8))
    return openclip_data.get_csv_dataset(args, preprocess, is_train=True, tokenizer=tokenizer)


@pytest.mark.parametrize("source", [shards_of, table_of])
@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_batches_of_all_sources_are_pinned_for_a_gpu(device, source, tmp_path):
    info = source(tmp_path)
    pin_batches({"train": info}, device)
    loader = info.dataloader if source is table_of else info.dataloader.pipeline[0]
    assert loader.pin_memory == (device != "cpu" or source is table_of)  # of a table by OpenCLIP, wherever it trains
    if source is table_of:
        assert numbered_rows(info).dataloader.pin_memory


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_a_run_pins_its_shards_batches_with_any_loss(loss, device, tmp_path):
    def as_if_on_it(argv):
        iterate = DataLoader.__iter__
        DataLoader.__iter__ = lambda loader: print(f"iterated, pinned: {loader.pin_memory}") or iterate(loader)
        hooks.pin_batches = lambda data, of_run: pin_batches(data, of_run.replace("cpu", device))
        return main(argv)

    argv = [*TINY, "--loss", loss, "--train-data", make_shards(tmp_path / "data"), "--logs", tmp_path]
    run = run_forked(as_if_on_it, (list(map(str, argv)),), tmp_path / "out")
    assert run.ok and run.output[0].count(f"iterated, pinned: {device == 'cuda'}") == 1, run


@pytest.mark.parametrize("source", [numbered_loader, numbered_rows])
def test_all_of_a_batch_can_be_pinned_ids_too(source, tmp_path, monkeypatch):
    """As torch's loader does it, with a stand-in for the copy."""
    pinned = []
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    data = table_of(tmp_path) if source is numbered_rows else make_shards(tmp_path, shards=1, per_shard=8)
    batch = next(iter(source(data).dataloader))
    images, texts, ids, positions = pin_memory(batch)
    assert [any(part is tensor for tensor in pinned) for part in batch[:3]] == [True] * 3
    assert all(torch.equal(a, b) for a, b in zip((images, texts, ids), batch[:3], strict=True))
    assert list(positions) == list(batch[3])


def test_ids_of_a_step_stay_pinned(monkeypatch):
    """Those of several micro-batches are joined, which alone would make ordinary memory of them."""
    pinned, told = [], []
    monkeypatch.setattr("torch.Tensor.is_pinned", lambda tensor: any(tensor is one for one in pinned))
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    batches = [("images", "texts", torch.tensor([n]).pin_memory(), ()) for n in range(4)]

    class Loader(list):
        num_batches, num_samples = 4, 4

    class Position:
        def start_epoch(self, epoch):
            pass

        def record(self, ids, positions):
            pass

    class Callback:
        def before_step(self, ids):
            told.append((ids.tolist(), ids.is_pinned()))

        def after_step(self, progress):
            pass

        between_steps, wait = after_step, None

    loop = LoopSettings(rank=0, world_size=1, batch_size=1, accum_freq=2, epochs=1, seed=0, device=SECOND)
    stepped = ResumableBatches(Loader(batches), loop, 0, None, Position())
    stepped.bind(Callback())
    assert len(list(stepped)) == 4 and told == [([0, 1], True), ([2, 3], True)]


@pytest.mark.parametrize("device", [SECOND, torch.device("cpu")])
def test_a_gpu_has_done_its_work_where_the_traced_steps_begin_and_end(device, tmp_path, monkeypatch):
    """The host is ahead of a GPU: work of the step before would be in the trace, and work of the last step missing."""
    done = []

    class Profiler:
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *of_error):
            pass

        def step(self):
            done.append("step")

    monkeypatch.setattr(profiling, "profile", Profiler)
    monkeypatch.setattr("torch.cuda.synchronize", done.append)
    trace = profiling.Trace("run", tmp_path, rank=0, accum_freq=1, device=device)
    batches = list(profiling.profiled(range(30), trace, num_steps=30, settle=lambda: None))
    assert batches == list(range(30))
    waits = [device] if device.type == "cuda" else []
    assert done == ["step"] * 11 + waits + ["step"] * 10 + waits + ["step"]

"""A step is few operations, since a GPU's host launches each by itself, and none at which it would wait."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from drive import run_steps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from trajectories import LOSSES, golden_settings, random_steps

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.loss import functional, fused, recorded

MOST = 130  # of v3 on one rank, forward and backward
WITHOUT_WORK = ("empty", "empty_like", "new_empty", "empty_strided", "detach")


class Operations(TorchDispatchMode):
    """The operations that would be kernels or copies: not those that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in WITHOUT_WORK:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operations_of_a_step(loss_name, copies):
    loss = FastCLIPLoss(FastCLIPConfig(loss_name, num_samples=64, epochs=8))
    loss.start_epoch(1)
    ids = torch.arange(16)
    ids[1] = 0 if copies else 1
    for counted in (False, True):
        features = [torch.nn.functional.normalize(torch.randn(16, 8), dim=1).requires_grad_() for _ in range(2)]
        with Operations() if counted else nullcontext() as operations:
            loss.begin_step(ids)
            loss(*features).backward()
    return operations.names


def test_a_step_of_v3_is_few_operations():
    assert len(operations_of_a_step("fastclip-v3", copies=False)) <= MOST


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_needs_more(loss):
    """With copies in the batch, which a GPU always looks for, a few more."""
    assert len(operations_of_a_step(loss, copies=False)) <= MOST
    assert len(operations_of_a_step(loss, copies=True)) <= MOST + 20


@pytest.mark.parametrize("loss_name", LOSSES)
def test_no_step_waits_for_a_gpu(loss_name, monkeypatch):
    """Tensors on a GPU that is not there have no values: to ask for one raises."""
    monkeypatch.setattr(recorded, "_pays", lambda first: False)
    with FakeTensorMode():
        loss = FastCLIPLoss(FastCLIPConfig(loss_name, num_samples=64, total_steps=9), device="cuda")
        assert loss.config.products == "tf32-gradient"
        ids = torch.arange(8, device="cuda")
        for epoch in range(2):
            loss.start_epoch(epoch)
            loss.begin_step(ids)
            for _ in range(2):
                value = loss(*(torch.randn(8, 4, device="cuda", requires_grad=True) for _ in range(2)))
                assert value.is_cuda
            loss.undo_step()
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            value.item()


@pytest.fixture
def compiled(monkeypatch):
    """Everything that is compiled on a GPU, traced as for it; what would be compiled anew is an error."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # it needs no C++ compiler
    monkeypatch.setattr(fused, "_wanted", True)
    monkeypatch.setattr(fused, "_works", True)
    # a GPU always looks for copies
    monkeypatch.setattr(functional, "are_distinct", lambda ids: False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss_name", ["fastclip-v3", "isogclr"])
def test_compiled_steps_are_the_steps_and_are_compiled_once(loss_name, compiled, monkeypatch):
    """gamma, the rates and the number of the epoch change from step to step."""
    ids = [range(8), [1, 9, 9, 3, 12, 13, 1, 5], range(4, 12), range(8), range(8, 16)]
    steps, settings = random_steps(ids, epochs=[0, 0, 1, 2, 3], aligned=0.5), golden_settings(loss_name)
    settings |= {"tau_lr_schedule": "cosine", "total_steps": 5}
    found = run_steps(settings, steps)
    assert fused._works
    monkeypatch.setattr(fused, "_wanted", False)
    expected = run_steps(settings, steps)
    for name, values in expected.items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(values), rtol=1e-9, atol=1e-12), name


def test_where_nothing_can_be_compiled_the_loss_runs_as_it_is_with_one_warning(monkeypatch, recwarn):
    def refuse(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler.\nMore")

    monkeypatch.setattr(fused, "_wanted", True)
    monkeypatch.setattr(fused, "_works", True)
    monkeypatch.setattr(torch, "compile", refuse)
    double = fused.fused(lambda x: 2 * x)
    assert [double(torch.ones(1)).item() for _ in range(3)] == [2, 2, 2]
    (warning,) = recwarn
    assert "Failed to find C compiler" in str(warning.message) and "\n" not in str(warning.message)


def test_an_error_of_the_loss_itself_is_not_taken_for_the_compilers(monkeypatch, recwarn):
    monkeypatch.setattr(fused, "_wanted", True)
    monkeypatch.setattr(fused, "_works", True)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fused.fused(torch.add)(torch.ones(2), torch.ones(3))
    assert fused._works and not len(recwarn)


def test_a_function_of_which_torch_compiles_no_more_shapes_runs_as_it_is(monkeypatch, recwarn):
    class FailOnRecompileLimitHit(Exception):
        pass

    def refuse(*args):
        raise FailOnRecompileLimitHit("recompile_limit reached with fullgraph=True")

    monkeypatch.setattr(fused, "_works", True)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: refuse)
    double = fused.fused(lambda x: 2 * x)
    with fused.compiled():
        assert double(torch.ones(1)).item() == 2
    assert fused._works and not len(recwarn)

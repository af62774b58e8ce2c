"""Steps with a non-finite feature or gradient: nothing moves in them, and too many in a row end the run."""

import copy
import math

import open_clip_train.main
import pytest
import timm.optim
import torch
import torch.distributed as dist
from cli import TINY, run_forked
from make_data import make_csv
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.loss import nonfinite
from open_clip_train_fastclip.loss.nonfinite import MOST_IN_A_ROW, NonfiniteGuard
from open_clip_train_fastclip.main import main

NAN, INF = math.nan, math.inf
B, WIDTH = 8, 16  # pairs of a rank's batch, width of images and texts


class Towers(nn.Module):
    """A batch norm in one of them, for its running statistics."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.text = nn.Linear(WIDTH, WIDTH)

    def forward(self, images, texts):
        return normalize(self.image(images), dim=1), normalize(self.text(texts), dim=1)


class Training:
    """A small loop as OpenCLIP's: one loss call and backward pass a micro-batch, then the optimizer."""

    def __init__(self, name="fastclip-v3", optimizer="adamw", scaler=None, wrap=lambda model: model):
        torch.manual_seed(0)
        self.towers = Towers()
        self.model = wrap(self.towers)
        self.optimizer = timm.optim.create_optimizer_v2(
            self.model, opt=optimizer, lr=1e-2, weight_decay=0.1, filter_bias_and_bn=False
        )
        # a constant rate: the clock of a cosine goes on in a bad step
        self.loss = FastCLIPLoss(
            FastCLIPConfig(loss=name, num_samples=4 * B, epochs=4, rho=2.0, tau_lr_schedule="const", tau_lr=1e-2)
        )
        self.guard = NonfiniteGuard(self.loss, self.optimizer, self.model, scaler)
        self.scaler = scaler

    def step(self, number, bad=None, bad_rank=0, micro_batches=(0,), bad_call=None, bad_gradient=None):
        """bad: put this number into an image of rank bad_rank, in all calls of the loss or in one of them alone.

        bad_gradient: put it into a gradient instead, as an overflow in the backward pass does.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        generator = torch.Generator().manual_seed(number)
        ids = torch.randperm(4 * B, generator=generator)[: B * world_size].chunk(world_size)[rank]
        images, texts = torch.randn(2, B * world_size, WIDTH, generator=generator).chunk(world_size, dim=1)[rank]
        self.loss.start_epoch(number // 4)
        self.loss.begin_step(ids)
        self.optimizer.zero_grad()
        for call in micro_batches:
            given = images.clone()
            if bad is not None and rank == bad_rank and bad_call in (None, call):
                given[1, 2] = bad
            image_features, text_features = self.model(given, texts)
            if bad_gradient is not None and rank == bad_rank and bad_call in (None, call):
                text_features.register_hook(lambda gradient: gradient * bad_gradient)
            value = self.loss(image_features, text_features) / len(micro_batches)
            (value if self.scaler is None else self.scaler.scale(value)).backward()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.guard.end_step()

    def state(self):
        """All that a step may move: name -> a copy."""
        table = {f"table {name}": column for name, column in self.loss.full_state().items()}
        state = flat(self.towers.state_dict()) | flat(self.optimizer.state_dict())
        return copy.deepcopy(state | table | self.loss.tau_state())


def flat(value, name=""):
    """{path: leaf} of nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if inner is None:
        return {name: value}
    return {path: leaf for key, child in inner for path, leaf in flat(child, f"{name}/{key}").items()}


def assert_same(expected, actual):
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        same = torch.equal(value, actual[name]) if isinstance(value, torch.Tensor) else value == actual[name]
        assert same, f"{name}: {value} became {actual[name]}"


OPTIMIZERS = ["adamw", "sgd", "lamb", "lion", "adan", "adafactor", "lookahead_adamw", "nadamw", "madgrad", "muon"]


KINDS = [{"bad": NAN}, {"bad": INF}, {"bad_gradient": NAN}, {"bad_gradient": INF}]  # of a bad step


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_does_not_notice_a_bad_step(optimizer, kind):
    training = Training(optimizer=optimizer)
    for number in range(5):  # also a bad step before the optimizer has any state
        before = training.state()
        training.step(number, **kind)
        assert_same(before, training.state())
        training.step(number)
        assert not torch.equal(before["/text.weight"], training.state()["/text.weight"])


def test_gradients_whose_squares_overflow_are_no_fault():
    training = Training()
    before = training.state()
    training.step(0, bad_gradient=1e25)
    assert training.guard.left_out == 0 and not torch.equal(before["/text.weight"], training.state()["/text.weight"])


@pytest.mark.parametrize("name", ["sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_training_goes_on_as_if_the_bad_steps_had_not_been(name, kind):
    with_bad, without = Training(name), Training(name)
    for number in range(6):
        without.step(number)
        with_bad.step(number)
        if number in (0, 2, 3):
            with_bad.step(number, **kind)
    assert_same(without.state(), with_bad.state())
    figures = with_bad.loss.metrics(), without.loss.metrics()
    assert [figure.pop("skipped_steps") for figure in figures] == [3, 0]
    assert figures[0] == pytest.approx(figures[1], rel=1e-12)


def compressed(model):
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


@pytest.mark.parametrize("wrap", [DistributedDataParallel, compressed])
@pytest.mark.parametrize("kind", [KINDS[0], *KINDS[2:]], ids=str)
def test_all_ranks_skip_what_is_bad_on_one(wrap, kind):
    def train():
        with_bad, without = (Training(wrap=wrap) for _ in range(2))
        for number in range(4):
            without.step(number)
            with_bad.step(number)
            with_bad.step(number, bad_rank=1, **kind)
        assert_same(without.state(), with_bad.state())
        return with_bad.loss.metrics()["skipped_steps"]

    assert run_ranks(2, train) == [4, 4]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=str)
@pytest.mark.parametrize("bad_call", [None, 0, 1])
def test_accumulation(bad_call, kind):
    """Every call of a step counts: with dropout a later one can be bad alone."""
    training = Training()
    training.step(0, micro_batches=(0, 1))
    before = training.state()
    training.step(1, micro_batches=(0, 1), bad_call=bad_call, **kind)
    assert_same(before, training.state())
    assert training.loss.metrics()["skipped_steps"] == training.guard.in_a_row == 1
    training.step(2, micro_batches=(0, 1))
    assert not torch.equal(before["/text.weight"], training.state()["/text.weight"])
    assert training.loss.metrics()["skipped_steps"] == 1 and training.guard.in_a_row == 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_a_gradient_scaler(kind):
    """It skips a step of gradients that are not finite by itself: the step counts all the same."""
    training = Training(scaler=torch.amp.GradScaler("cpu", init_scale=0.5))
    training.step(0)
    for in_a_row in (1, 2):
        before = training.state()
        training.step(in_a_row, **kind)
        assert_same(before, training.state())
        assert training.guard.in_a_row == in_a_row
    training.step(3)
    assert not torch.equal(before["/text.weight"], training.state()["/text.weight"])
    assert training.guard.in_a_row == 0


def test_a_scaler_that_looks_for_its_scale_is_no_fault():
    """Gradients that only a large scale makes overflow: more steps than a fault is given, and none of them moves u."""
    training = Training(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    before, skipped = training.state(), 0
    while training.loss.metrics()["skipped_steps"] == skipped:
        assert_same(before, training.state())
        assert training.guard.in_a_row == 0
        # as fp16 has it: what is above its range is infinite
        scale = training.scaler.get_scale()
        training.step(skipped, bad_gradient=INF if scale > 2.0**100 else None)
        skipped += 1
    assert skipped == 28 and training.scaler.get_scale() == 2.0**100
    assert not torch.equal(before["/text.weight"], training.state()["/text.weight"])


def test_a_loss_that_tells_nothing_of_its_features():
    """Those of OpenCLIP: what is wrong with the features shows in the gradients."""
    torch.manual_seed(0)
    towers = Towers()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2)
    guard = NonfiniteGuard(None, optimizer, towers, None)
    for bad in (NAN, 1.0, INF, 1.0):
        before = copy.deepcopy(flat(towers.state_dict()) | flat(optimizer.state_dict()))
        optimizer.zero_grad()
        image_features, text_features = towers(torch.randn(B, WIDTH) * bad, torch.randn(B, WIDTH))
        (image_features @ text_features.T).logsumexp(1).sum().backward()
        optimizer.step()
        guard.end_step()
        after = flat(towers.state_dict()) | flat(optimizer.state_dict())
        if bad == 1.0:
            assert guard.in_a_row == 0 and not torch.equal(before["/text.weight"], after["/text.weight"])
        else:
            assert guard.in_a_row == 1
            assert_same(before, after)


def test_too_many_in_a_row():
    training = Training()
    for number in range(MOST_IN_A_ROW - 1):
        training.step(number, bad=NAN)
    training.step(0)
    for number in range(MOST_IN_A_ROW):
        assert not training.guard.too_many
        training.step(number, bad=NAN)
    assert training.guard.too_many


# ------------------------------------------------------------------ through the command line


def train_with_bad_images(argv, bad_batches, bad_rank):
    """Our command line, with images of rank bad_rank that are not finite in these forward passes, counted from 0."""
    create, seen = open_clip_train.main.create_model_and_transforms, []

    def create_model_and_transforms(model_name, *args, **kwargs):
        model, *transforms = create(model_name, *args, **kwargs)

        def spoil(module, inputs):
            if module.training:
                seen.append(None)
                if len(seen) - 1 in bad_batches and int(torch.distributed.get_rank()) == bad_rank:
                    return (inputs[0] * NAN, *inputs[1:])
            return None

        model.register_forward_pre_hook(spoil)
        return model, *transforms

    open_clip_train.main.create_model_and_transforms = create_model_and_transforms
    return main(argv)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=192)  # 12 steps an epoch of 2 ranks


def run_with_bad_images(csv, logs, bad_batches, *more):
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--logs", str(logs), "--name", "run", *more]
    return run_forked(train_with_bad_images, (flags, bad_batches, 1), logs / "out", ranks=2)


@pytest.mark.parametrize(
    ("flags", "bad_batches", "skipped"),
    [
        ([], {0, 3, 4}, [1, 1, 1, 2] + [3] * 8),
        # four forward passes a step, of which the first two are without gradients
        (["--accum-freq", "2"], {1, 7}, [1, 2, 2, 2, 2, 2]),
    ],
    ids=["plain", "accumulation"],
)
def test_cli_bad_steps_are_counted_in_the_log(flags, bad_batches, skipped, csv, tmp_path):
    run = run_with_bad_images(csv, tmp_path, bad_batches, *flags)
    assert run.ok, run
    log = (tmp_path / "run" / "out.log").read_text()
    lines = [line for line in log.splitlines() if "FastCLIP Epoch" in line]
    assert [int(line.split("skipped_steps: ")[1].split()[0]) for line in lines] == skipped
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())
    steps = {state["step"].item() for state in checkpoint["optimizer"]["state"].values()}
    assert steps == {len(skipped) - skipped[-1]}


def test_cli_too_many_bad_steps_save_and_stop(csv, tmp_path):
    run = run_with_bad_images(csv, tmp_path, set(range(1, 12)))
    assert all(code == 2 for code in run.codes) and "Traceback" not in str(run), run
    complaints = [line for output in run.output for line in output.splitlines() if "error" in line.lower()]
    saved = tmp_path / "run" / "checkpoints" / "epoch_0_step_11"
    assert len(complaints) == 1 and str(saved) in complaints[0], run
    checkpoint = torch.load(saved / "checkpoint.pt", weights_only=True)
    steps = {state["step"].item() for state in checkpoint["optimizer"]["state"].values()}
    assert steps == {1}
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


@pytest.fixture
def told(monkeypatch):
    """As on a GPU: the optimizer is torch's AdamW, whose fused kernel a flag tells to do nothing."""
    monkeypatch.setattr(nonfinite, "_can_be_told", lambda optimizer: type(optimizer) is torch.optim.AdamW)


@pytest.mark.parametrize("name", ["isogclr", "fastclip-v1", "fastclip-v3"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gpu_leaves_out_the_same_steps_without_the_host(name, kind, told):
    """Also those that come before the optimizer has any state; the host counts each of them one step later."""
    with_bad, without = Training(name), Training(name)
    for number in range(5):
        with_bad.step(number, **kind)
        with_bad.step(number + 50, **kind)
        assert with_bad.guard._left_out == 1 and with_bad.guard.left_out == 2
        before = without.state()
        with_bad.step(number)
        without.step(number)
        assert_same(without.state(), with_bad.state())
        assert not torch.equal(before["/text.weight"], with_bad.state()["/text.weight"])
    assert with_bad.loss.skipped_steps == 10 and with_bad.guard.left_out == 0
    assert all(group["fused"] for group in with_bad.optimizer.param_groups)


def test_a_gpu_has_the_end_of_a_run_after_ten_steps_too(told):
    training = Training()
    training.step(0)
    for number in range(MOST_IN_A_ROW):
        assert not training.guard.too_many
        training.step(number, bad_gradient=NAN)
    training.step(0, bad_gradient=NAN)
    assert training.guard.too_many and training.guard.left_out == MOST_IN_A_ROW + 1


def test_ten_bad_steps_and_a_good_one_are_no_end(told):
    training = Training()
    for number in range(MOST_IN_A_ROW):
        training.step(number, bad=NAN)
    training.step(0)
    assert not training.guard.too_many


def test_an_optimizer_of_a_checkpoint_is_fused_with_its_state(told):
    """What a run without a GPU has saved goes on, and the other way round."""
    first, heir = Training(), Training()
    first.step(0)
    heir.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    NonfiniteGuard(heir.loss, heir.optimizer, heir.model, None)
    assert all(state["step"].item() == 1 for state in heir.optimizer.state.values())
    heir.step(1)
    assert all(state["step"].item() == 2 for state in heir.optimizer.state.values())
    heir.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))  # and once more, into the fused one
    heir.step(2)
    assert all(state["step"].item() == 2 for state in heir.optimizer.state.values())


@pytest.mark.parametrize("bad", [0.0, NAN, INF, -INF])
def test_gradients_in_bf16_are_looked_at_without_what_a_gpu_lacks(bad, monkeypatch):
    def refuse(*args):
        raise NotImplementedError("not implemented for 'BFloat16'")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", refuse)
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": []}, {"params": parameters}], lr=0.1)
    guard = NonfiniteGuard(None, optimizer, nn.Identity(), None)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[1].grad[2] = bad
    optimizer.step()
    guard.end_step()
    assert guard.left_out == (bad != 0) and (parameters[0] == 1).all() == (bad != 0)


@pytest.mark.parametrize("loss, scaler", [(None, None), ("fastclip-v3", torch.amp.GradScaler("cpu"))])
def test_openclips_loss_and_a_scaler_keep_their_optimizer(loss, scaler, told):
    towers = Towers()
    optimizer = torch.optim.AdamW(towers.parameters())
    NonfiniteGuard(loss and FastCLIPLoss(FastCLIPConfig(loss, 8)), optimizer, towers, scaler)
    assert not any(group["fused"] for group in optimizer.param_groups)

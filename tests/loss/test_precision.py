"""The precision of the products: what is exact, what is faster, and the switches of whoever calls the loss."""

import pytest
import torch
from torch.nn.functional import normalize
from trajectories import golden_settings, random_steps

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.loss import contrast, logits
from open_clip_train_fastclip.loss.functional import LOG2_E
from open_clip_train_fastclip.loss.precision import default_products, float32_products, tensor_cores

NEW = {name: getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")}
needs_new_switches = pytest.mark.skipif(
    not hasattr(NEW["cuda"], "fp32_precision"), reason="torch 2.9 brought the switches fp32_precision"
)


@pytest.fixture
def switches():
    """Put the process's switches back."""
    yield
    torch.set_float32_matmul_precision("highest")
    for switch in NEW.values():
        if hasattr(switch, "fp32_precision"):
            switch.fp32_precision = "none"


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("old", ["highest", "high", "medium"])
def test_the_callers_old_switch_is_put_back(old, tf32, switches):
    torch.set_float32_matmul_precision(old)
    with float32_products(tf32):
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        with tensor_cores():
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.get_float32_matmul_precision() == old


@needs_new_switches
@pytest.mark.parametrize("value", ["tf32", "ieee"])
@pytest.mark.parametrize("backend", NEW)
def test_the_callers_new_switch_is_put_back(backend, value, switches):
    """The old one, which the new one contradicts then, can be read meanwhile: TunableOp and torch.compile do."""
    NEW[backend].fp32_precision = value
    with float32_products(tf32=False):
        assert NEW[backend].fp32_precision == "ieee"
        assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert NEW[backend].fp32_precision == value


@needs_new_switches
def test_a_switch_that_inherits_tf32_is_exact_meanwhile(switches):
    try:
        torch.backends.fp32_precision = "tf32"
        with float32_products(tf32=False):
            assert NEW["cuda"].fp32_precision == "ieee"
        assert NEW["cuda"].fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_an_exponent_at_the_smallest_temperature(dtype):
    """h at tau 0.01 against float64 from the same (rounded) features: a few units in the last place of float32.

    How many depends on the order in which a CPU adds; TF32 or bf16 products would be off by 0.01 and more.
    """
    generator = torch.Generator().manual_seed(0)
    image, noise = (normalize(torch.randn(256, 512, generator=generator), dim=1) for _ in range(2))
    text = normalize(image.roll(1, 0) + 0.3 * noise, dim=1).to(dtype)  # beside the diagonal exponents up to 96
    image = image.to(dtype)
    tiles = []

    class Kept(logits.Logits):
        def __iter__(self):
            for columns, tile, places in super().__iter__():
                tiles.append(tile.clone())
                yield columns, tile, places

    loss = FastCLIPLoss(FastCLIPConfig("fastclip-v1", 256, temperature=0.01))
    with pytest.MonkeyPatch.context() as patches, torch.autocast("cpu", torch.bfloat16):
        patches.setattr(contrast, "Logits", Kept)
        loss(image.requires_grad_(), text, torch.arange(256)).backward()
    exact = ((image.detach().double() @ text.double().T) / 0.01).fill_diagonal_(0)
    found = (tiles[0].double() / LOG2_E).fill_diagonal_(0)
    assert exact.max() > 90 and (found - exact).abs().max() < 1e-4


def precisions(products, monkeypatch):
    """The products of two steps, as (which, precision): S of similarities, G of gradients."""
    seen = []
    monkeypatch.setattr(
        logits.torch.Tensor, "__matmul__", lambda a, b: (seen.append(("S", now())), torch.mm(a, b))[1], raising=False
    )
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: (seen.append(("G", now())), addmm(*args))[1])
    settings = golden_settings("fastclip-v3")
    ((image, text, ids, _),) = random_steps([range(8)], epochs=[0], aligned=0.3)
    loss = FastCLIPLoss(FastCLIPConfig(**settings, products=products))
    loss.begin_step(torch.tensor(ids))
    for _ in range(2):
        loss(*(torch.tensor(f, dtype=torch.float32, requires_grad=True) for f in (image, text))).backward()
    return seen


def now():
    return torch.get_float32_matmul_precision()


@pytest.mark.parametrize("products,similarities,gradients", [
    ("exact", "highest", "highest"), ("tf32-gradient", "highest", "high"), ("tf32", "high", "high"),
])  # fmt: skip
def test_each_product_has_the_precision_of_the_setting(products, similarities, gradients, monkeypatch, switches):
    torch.set_float32_matmul_precision("medium")
    seen = precisions(products, monkeypatch)
    assert seen == 2 * [("S", similarities), ("G", gradients), ("G", gradients)]
    assert now() == "medium"


def test_the_default_is_that_of_the_device():
    assert FastCLIPLoss(FastCLIPConfig("fastclip-v3", 8)).config.products == "exact"
    assert default_products("cuda:1") == "tf32-gradient"
    with pytest.raises(UserError, match="products is 'bf16'"):
        FastCLIPConfig("fastclip-v3", 8, products="bf16")


def rounded_to_tf32(x):
    """Ten bits of mantissa, as tensor cores read float32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("tau", [0.01, 0.03, 0.07])
def test_the_default_of_a_gpu_is_below_a_tenth_of_what_amp_does(tau, monkeypatch):
    """TF32 in the two products of the gradient alone, emulated: u and tau stay as they are."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(128, 512, generator=generator), dim=1)
    text = normalize(0.1 * image + normalize(torch.randn(128, 512, generator=generator), dim=1), dim=1)

    def gradients(dtype):
        config = FastCLIPConfig("fastclip-v3", 128, temperature=tau, table_dtype=dtype)
        loss = FastCLIPLoss(config)
        leaves = [f.to(dtype, copy=True).requires_grad_() for f in (image, text)]
        loss(*leaves, torch.arange(128)).backward()
        return torch.cat([leaf.grad.double() for leaf in leaves]), loss

    exact, _ = gradients(torch.float64)
    _, in_float32 = gradients(torch.float32)
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda s, a, b: addmm(s, rounded_to_tf32(a), rounded_to_tf32(b)))
    found, loss = gradients(torch.float32)
    assert (found - exact).norm() / exact.norm() < 5.8e-4
    assert torch.equal(loss.table.rows, in_float32.table.rows) and loss.temperature == in_float32.temperature

"""In which precision the loss multiplies matrices, whatever the caller has switched on around it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def default_products(device: torch.device | str) -> str:
    """The fastest of config.PRODUCTS whose error is below a tenth of what amp makes of the features by itself.

    amp rounds the last projection, which is 5.8e-3 of the gradient (relative, float64 as the truth). TF32 in the two
    products of the gradient adds 2.7e-4 at tau = 0.01; in the similarities too it would be 8e-4, and move u.
    """
    return "tf32-gradient" if torch.device(device).type == "cuda" else "exact"


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices in float32, or in TF32 where the device has it: no bf16 on a CPU.

    At tau = 0.01 an error of 1e-3 in a similarity changes exp(h) by a tenth. In float32 an exponent of up to 96 is off
    by less than 1e-4 there, also with bf16 features.
    """
    # Both of torch's interfaces are set, since TunableOp and torch.compile raise where the old one contradicts the new.
    backends: Any = torch.backends
    switches = [backends.cuda.matmul, backends.mkldnn.matmul]
    new = [switch for switch in switches if hasattr(switch, "fp32_precision")]  # torch 2.9
    before, old = [switch.fp32_precision for switch in new], "highest"
    with contextlib.suppress(RuntimeError):  # the caller has used the new one alone
        old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(old)
        for switch, value in zip(new, before, strict=True):
            switch.fp32_precision = value


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    """TF32 within float32_products()."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""A small problem that is the same on every machine: linear towers on fixed features, and what trains them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss

SAMPLES, WIDTH, BATCH = 256, 32, 64
STEPS_PER_EPOCH = SAMPLES // BATCH


@dataclass
class Trajectory:
    """What a run went through, as arrays that another process can read: values [steps]; at its end weights and u."""

    values: np.ndarray
    weights: list[np.ndarray]
    log_u: list[np.ndarray]


def make_pairs() -> tuple[Tensor, Tensor]:
    """Images and texts [SAMPLES, WIDTH], float64, made on the CPU: a text is a noisy turn of its image."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images = normalize(random(SAMPLES, WIDTH), dim=1)
    turned = images @ (random(WIDTH, WIDTH) / WIDTH**0.5)
    return images, normalize(turned + 0.3 * random(SAMPLES, WIDTH) / WIDTH**0.5, dim=1)


class _OpenClip:
    """OpenCLIP's loss at a constant temperature, called as FastCLIPLoss is."""

    def __init__(self) -> None:
        self.loss = ClipLoss()

    def start_epoch(self, epoch: int) -> None:
        """Epochs are all alike."""

    def begin_step(self, ids: Tensor) -> None:
        """Which samples they are is all the same."""

    def full_state(self) -> dict[str, Tensor]:
        """It remembers nothing."""
        return {}

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        return self.loss(image, text, 1 / 0.07)


def make_loss(name: str, steps: int, dtype: torch.dtype, device: str, products: str | None = None) -> Any:
    """The loss of the problem, "clip" or one of FastCLIP's with u and tau of `dtype`."""
    if name == "clip":
        return _OpenClip()
    config = FastCLIPConfig(
        loss=name, num_samples=SAMPLES, epochs=max(1, steps // STEPS_PER_EPOCH), gamma=0.3, lr=1e-2, total_steps=steps,
        table_dtype=dtype, products=products,
    )  # fmt: skip
    return FastCLIPLoss(config, device=device)


def train(loss: Any, steps: int, dtype: torch.dtype, device: str) -> Trajectory:
    """On every rank: `steps` global batches of BATCH pairs, in the arithmetic of `dtype`."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images, texts = (pairs.to(device, dtype) for pairs in make_pairs())
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for _ in range(2)
    ]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    values, order = [], torch.empty(0, dtype=torch.int64)
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    for step in range(steps):
        if step % STEPS_PER_EPOCH == 0:
            loss.start_epoch(step // STEPS_PER_EPOCH)
            order = torch.randperm(SAMPLES, generator=generator)
        first = step % STEPS_PER_EPOCH * BATCH
        ids = order[first : first + BATCH][own]
        loss.begin_step(ids)
        image, text = (normalize(x[ids.to(device)] @ w, dim=1) for x, w in zip((images, texts), weights, strict=True))
        value = loss(image, text)
        optimizer.zero_grad()
        value.backward()
        if ranks > 1:
            _average([weight.grad for weight in weights], ranks)
        optimizer.step()
        values.append(value.detach())
    return Trajectory(
        torch.stack(values).cpu().numpy(),
        [weight.detach().cpu().numpy() for weight in weights],
        [column.numpy() for name, column in loss.full_state().items() if name.startswith("log_u")],
    )


def _average(gradients: list[Tensor], ranks: int) -> None:
    """As DistributedDataParallel does; with gloo over the host, for ranks that share a GPU."""
    for gradient in gradients:
        total = gradient if dist.get_backend() == "nccl" else gradient.cpu()
        dist.all_reduce(total)
        gradient.copy_(total / ranks)

"""One rank's view of a distributed loss, in one process: what the other ranks would have sent is made beforehand.

Only the collectives themselves are left out, for both losses; what a rank does around them is done. Of OpenCLIP that
is ClipLoss with its own gather_features: the concatenation of the gathered pieces, the logits, the cross entropies and
the gradients of the local features, of the temperature and of all B gathered features. (Before its reduce-scatter NCCL
copies those B gradients into one buffer: left out, in OpenCLIP's favour.) Of ours it is begin_step (the samples' rows
of the table), packing the features, g, the new u and tau, the write to the table and the gradients.

Shapes: b pairs of this rank, B pairs of the global batch, d width of the embedding.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed.nn
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.loss import fastclip

TABLE_ROWS = 1_000_000  # of the per-sample table: more than a cache holds
OPEN_CLIP, FLOOR = "open-clip", "four-matmuls"


# What the features and autocast are of: float32 as --precision fp32 has them, bf16 as pure_bf16, amp_bf16 as its name
DTYPES = {
    "float32": (torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "amp_bf16": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement, written "160x5120x512"."""

    b: int
    B: int
    d: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From b x B x d; ValueError if B is no multiple of b."""
        b, B, d = map(int, text.split("x"))
        if b < 1 or d < 1 or B < 2 or B % b:
            raise ValueError(f"{text}: B must be a multiple of b")
        return cls(b, B, d)

    def __str__(self):
        return f"{self.b}x{self.B}x{self.d}"

    @property
    def ranks(self) -> int:
        return self.B // self.b


class Features:
    """Unit vectors such as towers give, every pair's image and text near each other, and the ids of their samples."""

    def __init__(self, case: Case, device: str, kind: str):
        """kind: one of DTYPES."""
        dtype, self.low_precision = DTYPES[kind]
        generator = torch.Generator().manual_seed(0)
        noise_Bd = torch.randn(case.B, case.d, generator=generator)
        image_Bd = normalize(torch.randn(case.B, case.d, generator=generator), dim=1)
        text_Bd = normalize(image_Bd + normalize(noise_Bd, dim=1), dim=1)
        self.image_Bd, self.text_Bd = image_Bd.to(device, dtype), text_Bd.to(device, dtype)
        self.ids_B = torch.randperm(max(TABLE_ROWS, case.B), generator=generator)[: case.B].to(device)

    def local(self, b: int) -> list[Tensor]:
        """This rank's image and text features as a model's output would be, [b, d] each."""
        return [f[:b].clone().requires_grad_() for f in (self.image_Bd, self.text_Bd)]

    def autocast(self):
        """The autocast under which a training loop has features of this kind."""
        low_precision = self.low_precision
        return torch.autocast(self.image_Bd.device.type, low_precision) if low_precision else nullcontext()


class StandInCollectives:
    """Takes the place of loss.collectives: a gather gives prepared tensors with this rank's share filled in."""

    def __init__(self, world_size: int, prepared: list[Tensor]):
        self.world_size, self.rank = world_size, 0
        self.prepared = {self._kind(tensor): tensor for tensor in prepared}

    @staticmethod
    def _kind(tensor: Tensor) -> tuple:
        return tensor.dtype, tensor.shape[1:]

    def gather(self, local: Tensor) -> Tensor:
        if self.world_size == 1:
            return local
        kind = self._kind(local)
        if kind not in self.prepared:  # the other ranks' new values, made once: like this rank's
            self.prepared[kind] = torch.cat([local] * self.world_size)
        self.prepared[kind][: len(local)].copy_(local)
        return self.prepared[kind]

    def start_sum(self, local: Tensor) -> Callable[[], Tensor]:
        return lambda: local


def open_clip_step(case: Case, features: Features) -> Callable[[], None]:
    """Forward and backward of OpenCLIP's ClipLoss as --local-loss --gather-with-grad runs it."""
    leaves = features.local(case.b)
    pieces = [[piece.requires_grad_() for piece in f.split(case.b)] for f in (features.image_Bd, features.text_Bd)]
    log_scale = torch.tensor(2.66, device=leaves[0].device, requires_grad=True)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=case.ranks)

    def step():
        for tensor in (*leaves, *pieces[0], *pieces[1], log_scale):
            tensor.grad = None
        gathered = iter(pieces)
        with patch.object(torch.distributed.nn, "all_gather", lambda _: next(gathered)), features.autocast():
            value = loss(*leaves, log_scale.exp())
        value.backward()

    return step


def fastclip_step(name: str, case: Case, features: Features) -> Callable[[], None]:
    """Forward and backward of FastCLIPLoss in its second epoch, where u has a memory."""
    leaves = features.local(case.b)
    config = FastCLIPConfig(loss=name, num_samples=max(TABLE_ROWS, case.B), epochs=32, gamma=0.2)
    packed_B2d = torch.stack([features.image_Bd, features.text_Bd], dim=1)
    stand_in = StandInCollectives(case.ranks, [packed_B2d, features.ids_B.clone()])
    with patch.object(fastclip, "Collectives", lambda: stand_in):
        loss = FastCLIPLoss(config, device=leaves[0].device)
    loss.start_epoch(1)
    ids_b = features.ids_B[: case.b]

    def step():
        for leaf in leaves:
            leaf.grad = None
        loss.begin_step(ids_b)
        with features.autocast():
            value = loss(*leaves)
        value.backward()

    return step


def four_products(case: Case, features: Features) -> Callable[[], None]:
    """The floor: two products for the similarities, two for the gradients, into memory that is there already.

    They are of the dtype that autocast gives products.
    """
    dtype = features.low_precision or features.image_Bd.dtype
    image_Bd, text_Bd = features.image_Bd.to(dtype), features.text_Bd.to(dtype)
    weights_bB = image_Bd.new_empty(case.b, case.B)
    gradient_bd = torch.empty_like(image_Bd[: case.b])

    def step():
        for anchors_bd, items_Bd in ((image_Bd[: case.b], text_Bd), (text_Bd[: case.b], image_Bd)):
            torch.mm(anchors_bd, items_Bd.T, out=weights_bB)
            torch.mm(weights_bB, items_Bd, out=gradient_bd)

    return step


def make_step(name: str, case: Case, features: Features) -> Callable[[], None]:
    """The step of OPEN_CLIP, of FLOOR or of a FastCLIP loss."""
    if name == OPEN_CLIP:
        return open_clip_step(case, features)
    if name == FLOOR:
        return four_products(case, features)
    return fastclip_step(name, case, features)

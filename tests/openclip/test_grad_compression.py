"""--grad-compression: fewer bytes in DDP's all-reduce of parameter gradients, and training still learns."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from ranks import run_ranks

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.openclip.checkpoints import EpochCheckpoints
from open_clip_train_fastclip.openclip.hooks import Run


def train(kind, steps):
    """Train two linear towers on pairs that match; bytes of each step's all-reduces, and first and last recall."""
    torch.manual_seed(0)
    images = torch.randn(32, 64)
    texts = images @ torch.randn(64, 64) / 8  # a linear map ties the pairs together
    towers = torch.nn.ModuleDict({"image": torch.nn.Linear(64, 64), "text": torch.nn.Linear(64, 64)})
    run = Run()
    run.args = SimpleNamespace(grad_compression=kind, save_most_recent=False, delete_previous_checkpoint=False)
    run.checkpoints = EpochCheckpoints(run.args)
    ddp = run.torch_of_main(torch).nn.parallel.DistributedDataParallel(_Both(towers), device_ids=["cpu"])
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=3e-3)
    loss = FastCLIPLoss(FastCLIPConfig(loss="fastclip-v3", num_samples=32, epochs=10, rho=2.0))
    sent, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sent[-1] += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    rank, recalls = dist.get_rank(), []
    for step in range(steps):
        ids = torch.arange(16) + 16 * rank
        with torch.no_grad():
            all_images, all_texts = ddp.module(images, texts)
            recalls.append(((all_images @ all_texts.T).argmax(1) == torch.arange(32)).float().mean().item())
        loss.start_epoch(min(step // 10, 9))
        value = loss(*ddp(images[ids], texts[ids]), ids)
        optimizer.zero_grad()
        sent.append(0)
        dist.all_reduce = counted
        value.backward()
        dist.all_reduce = all_reduce
        optimizer.step()
    gradient_bytes = sum(p.grad.nbytes for p in ddp.parameters())
    return sent, gradient_bytes, recalls[0], recalls[-1]


class _Both(torch.nn.Module):
    def __init__(self, towers):
        super().__init__()
        self.towers = towers

    def forward(self, images, texts):
        normalize = torch.nn.functional.normalize
        return normalize(self.towers["image"](images), dim=1), normalize(self.towers["text"](texts), dim=1)


def test_bf16_halves_the_bytes_and_learns():
    sent, gradient_bytes, first, last = run_ranks(2, train, "bf16", 60)[0]
    assert set(sent) == {gradient_bytes // 2}
    assert first < 0.3 and last > 0.9


def test_without_it_learns():
    *_, first, last = run_ranks(2, train, "none", 60)[0]
    assert first < 0.3 and last > 0.9

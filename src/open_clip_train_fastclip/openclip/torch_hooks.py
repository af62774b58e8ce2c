"""What OpenCLIP's modules see in the place of torch."""

import argparse
import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from .checkpoints import EpochCheckpoints
from .patches import View


class TorchHooks:
    """Those replacements of patches.PATCHES that stand in for torch itself."""

    args: argparse.Namespace
    checkpoints: EpochCheckpoints

    def torch_of_distributed(self, stock: Any) -> View:
        """torch as OpenCLIP's distributed module sees it: process groups get --dist-timeout."""
        timeout = timedelta(seconds=self.args.dist_timeout)
        init = functools.partial(dist.init_process_group, timeout=timeout)
        return View(stock, distributed=View(stock.distributed, init_process_group=init))

    def torch_of_main(self, stock: Any) -> View:
        """torch as main() sees it: atomic saves; DDP that takes a model on the CPU, and compresses if asked to."""

        def distributed(model: nn.Module, device_ids: Any = None, **kwargs: Any) -> nn.Module:
            if device_ids and torch.device(device_ids[0]).type == "cpu":
                device_ids = None
            ddp = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, **kwargs)
            if self.args.grad_compression == "bf16":
                ddp.register_comm_hook(None, bf16_compress_hook)
            return ddp

        parallel = View(stock.nn.parallel, DistributedDataParallel=distributed)
        return View(stock, save=self.checkpoints.save, nn=View(stock.nn, parallel=parallel))

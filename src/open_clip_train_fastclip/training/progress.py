"""How a rank's training loop draws its batches, and where the run stands."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoopSettings:
    """What a training loop is from a batch to an epoch: the same on all ranks but for `rank` and `device`."""

    rank: int
    world_size: int
    batch_size: int  # pairs of a rank in a micro-batch
    accum_freq: int  # micro-batches a step
    epochs: int
    seed: int
    device: torch.device  # that the model is on


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps."""

    epoch: int  # epochs done
    batches: int  # of the running epoch that are done, of each rank
    num_batches: int  # of an epoch
    accum_freq: int

    @property
    def step(self) -> int:
        """Steps of the running epoch that are done."""
        return self.batches // self.accum_freq

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; batches that fill no step are left over."""
        return self.num_batches // self.accum_freq

    @property
    def global_step(self) -> int:
        """Steps done, if all epochs have as many as the running one."""
        return self.steps_per_epoch * self.epoch + self.step

"""SampleTable: what is remembered of every sample, split over the ranks."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .collectives import Collectives
from .config import FastCLIPConfig
from .fused import fused
from .own_tensors import OwnTensors

U_COLUMNS = ("log_u_image", "log_u_text")
TAU_COLUMNS = ("tau_image", "tau_text", "tau_m_image", "tau_m_text", "tau_v_image", "tau_v_text")


def columns_of(config: FastCLIPConfig) -> tuple[str, ...]:
    """The columns of the table; a sample takes as many numbers of config.table_dtype."""
    return U_COLUMNS + TAU_COLUMNS if config.individual_tau else U_COLUMNS


class SampleTable(OwnTensors):
    """A table of N samples: log u of both modalities and, with individual temperatures, tau and its Adam moments.

    Its rows are split, not copied: rank r of K holds the ids from r * ceil(N/K) on. `rows` has one spare row at the
    end, which other ranks' ids are read from and written to, so that no step needs the number of its own ids on the
    host; with several ranks it is zero. An unvisited sample has log u = -inf.
    """

    rows: Tensor  # [own ids + 1, C]

    def __init__(self, config: FastCLIPConfig, collectives: Collectives):
        super().__init__()
        self.num_samples = config.num_samples
        self.columns = columns_of(config)
        self.collectives = collectives
        self.rows_per_rank = math.ceil(self.num_samples / collectives.world_size)
        self.start = min(collectives.rank * self.rows_per_rank, self.num_samples)
        self.stop = min(self.start + self.rows_per_rank, self.num_samples)
        empty_row = torch.zeros(len(self.columns), dtype=config.table_dtype)
        empty_row[:2] = -math.inf
        if config.individual_tau:
            empty_row[2:4] = config.temperature
        self.own("rows", empty_row.repeat(self.stop - self.start + 1, 1))
        if collectives.world_size > 1:
            self.rows[-1] = 0.0

    def local(self, column: str) -> Tensor:
        """View of one column for this rank's own ids, [stop - start]."""
        return self.rows[:-1, self.columns.index(column)]

    def locate(self, ids_B: Tensor) -> Tensor:
        """The rows of `ids_B` on this rank, [B]: the spare one for those of other ranks."""
        return ids_B if self.collectives.world_size == 1 else _within(ids_B, self.start, self.stop)

    def read(self, places_B: Tensor) -> Callable[[], Tensor]:
        """Begin to fetch rows, of ids that are the same on every rank; calling the result gives them, [B, C]."""
        return self.collectives.start_sum(self.rows[places_B])

    def write(self, places_B: Tensor, rows_BC: Tensor) -> None:
        """Store rows; equal places must bring equal rows, or which of them stays is undefined."""
        self.rows.index_copy_(0, places_B, rows_BC)
        if self.collectives.world_size > 1:
            self.rows[-1].zero_()

    def num_visited(self) -> Tensor:
        """Number of samples that have been seen, over all ranks (collective), 0-d int64."""
        return self.collectives.start_sum(torch.isfinite(self.local("log_u_image")).sum())()

    def mean_tau(self) -> Tensor:
        """Mean individual temperature over all samples and both modalities (collective), 0-d float64."""
        total = self.local("tau_image").sum(dtype=torch.float64) + self.local("tau_text").sum(dtype=torch.float64)
        return self.collectives.start_sum(total)() / (2 * self.num_samples)

    def full(self) -> dict[str, Tensor]:
        """All columns over all N samples on the CPU of every rank (collective)."""
        columns = {}
        for name in self.columns:
            padded = self.rows.new_zeros(self.rows_per_rank)
            padded[: self.stop - self.start] = self.local(name)
            columns[name] = self.collectives.gather(padded)[: self.num_samples].cpu()
        return columns


@fused
def _within(ids_B: Tensor, start: int, stop: int) -> Tensor:
    return torch.where((ids_B >= start) & (ids_B < stop), ids_B - start, stop - start)

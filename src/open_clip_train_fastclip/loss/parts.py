"""Algorithm 1 between its collectives: what a rank computes, in pure functions of tensors.

Shapes and symbols are those of fastclip.py. What a function needs of the epoch and the step comes in tensors, so that
one recording serves all steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import functional, moves
from .config import FastCLIPConfig
from .contrast import Contrast
from .precision import float32_products
from .recorded import P, R, Recorded
from .sample_table import SampleTable


class Copies(NamedTuple):
    """Which samples of a global batch come several times; both None: none, as far as can be told without waiting."""

    last_B: Tensor | None  # position of the last copy of the same sample in the global batch
    copies_B: Tensor | None  # at a last copy: how many copies there are; elsewhere 0


class State(NamedTuple):
    """What a step finds and moves, beside the rows of its samples."""

    visited: Tensor  # see FastCLIPLoss
    mean_individual_tau: Tensor
    skipped_steps: Tensor
    global_tau: Tensor | None  # GlobalTemperature.numbers; None with individual temperatures


class Compared(NamedTuple):
    """The local anchors against the global batch."""

    contrast: Contrast
    tau: Tensor  # the step's: 0-d, or [B, 2] with individual temperatures
    local: moves.Local


class Concluded(NamedTuple):
    """What the step leaves behind."""

    moved: moves.Moved
    before: State  # what was there
    state: State  # what is there now
    gradients_2bd: Tensor  # of the local image and text features


class Parts:
    """The parts of one rank; `recorded`: on a GPU, see Recorded."""

    def __init__(self, config: FastCLIPConfig, table: SampleTable, recorded: bool):
        self.config, self.locate = config, table.locate
        self.rank, self.world_size = table.collectives.rank, table.collectives.world_size

        def prepared(function: Callable[P, R]) -> Callable[P, R]:
            return Recorded(function) if recorded else function

        self.look_up = prepared(self._look_up)
        self.compare, self.conclude = prepared(self._compare), prepared(self._conclude)
        self.compare_again, self.conclude_again = prepared(self._compare_again), prepared(self._gradients)
        self.undo = prepared(self._undo)

    def _look_up(self, ids_B: Tensor, are_distinct: bool) -> tuple[Tensor, Copies]:
        """Places in the table, [B], and copies of the samples."""
        copies = Copies(None, None) if are_distinct else Copies(*functional.last_copies(ids_B))
        return self.locate(ids_B), copies

    def _compare(
        self, features_B2d: Tensor, rows_BC: Tensor, copies: Copies, global_tau: Tensor | None, numbers: Tensor,
        peak_tau_lr: Tensor,
    ) -> Compared:  # fmt: skip
        """Steps 2 and 3: g of the local anchors, their new u and, with individual temperatures, tau.

        numbers: moves.epoch_numbers(); peak_tau_lr: temperature.peak_tau_lr_at(), 0-d.
        """
        c = self.config
        with float32_products(tf32=c.products == "tf32"):
            tau = rows_BC[:, 2:4] if global_tau is None else torch.exp(-global_tau[0])
            contrast = Contrast(features_B2d, tau, self.rank, self.world_size, copies.last_B)
            own, copies_B = contrast.own, copies.copies_B
            local = moves.local_moves(
                contrast.diagonal_b,
                contrast.sums(with_mean=c.learns_global_tau or c.individual_tau),
                tau[own] if tau.dim() else tau,
                rows_BC[own],
                None if copies_B is None else copies_B[own],
                numbers,
                peak_tau_lr,
                len(rows_BC),
                c,
            )
        return Compared(contrast, tau, local)

    def _conclude(
        self, diagonal_B: Tensor, columns_B2: tuple[Tensor, ...], slopes_K: Tensor | None, compared: Compared,
        rows_BC: Tensor, copies: Copies, state: State, numbers: Tensor, peak_tau_lr: Tensor,
    ) -> Concluded:  # fmt: skip
        """Steps 4 and 5: what everybody's new values make of the table, of a global tau and of the gradients."""
        moved = moves.global_moves(
            diagonal_B, columns_B2, slopes_K, rows_BC, copies, compared.tau, state.global_tau, numbers, peak_tau_lr,
            self.config,
        )  # fmt: skip
        mean_tau = state.mean_individual_tau
        if moved.tau_moved is not None:
            mean_tau = mean_tau + moved.tau_moved / (2 * self.config.num_samples)
        new = State(state.visited + moved.visited, mean_tau, state.skipped_steps + ~moved.usable, moved.global_tau)
        log_g_b2 = compared.local.log_g_b2
        gradients_2bd = self._gradients(diagonal_B, moved.log_eps_u_B2, log_g_b2, compared.tau, compared.contrast)
        return Concluded(moved, state, new, gradients_2bd)

    def _compare_again(self, features_B2d: Tensor, tau: Tensor, copies: Copies) -> tuple[Contrast, Tensor]:
        """The contrast and log g [b, 2] in a later call of a step, whose u and tau have moved."""
        with float32_products(tf32=self.config.products == "tf32"):
            contrast = Contrast(features_B2d, tau, self.rank, self.world_size, copies.last_B)
            own_tau = (tau[contrast.own] if tau.dim() else tau).to(features_B2d.dtype)
            own_b2 = contrast.diagonal_b[:, None] / own_tau
            log_g_b2, _ = functional.log_g(*contrast.sums(with_mean=False), own_b2, len(features_B2d))
        return contrast, log_g_b2

    def _undo(
        self, where: Tensor, old_BC: Tensor, new_BC: Tensor, before: State, now: State, usable: Tensor
    ) -> tuple[Tensor, State, Tensor]:
        """Rows, state and `usable` after a step that, where `where` is True, did not count: it was no usable one."""

        def chosen(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(where, old, new)

        numbers = now.global_tau
        if before.global_tau is not None and numbers is not None:
            numbers = chosen(before.global_tau, numbers)
        visited, mean_tau = map(chosen, before[:2], now[:2])
        state = State(visited, mean_tau, now.skipped_steps + (where & usable), numbers)
        return chosen(old_BC, new_BC), state, usable & ~where

    def _gradients(
        self, diagonal_B: Tensor, log_eps_u_B2: Tensor, log_g_b2: Tensor, tau: Tensor, contrast: Contrast
    ) -> Tensor:
        """Step 5 alone: the gradients of the local features, [2, b, d]."""
        products = self.config.products
        with float32_products(tf32=products == "tf32"):
            bias_B2, share_b1 = moves.weight_biases(
                diagonal_B, log_eps_u_B2, log_g_b2, tau, contrast.first, self.world_size, self.config
            )
            return contrast.gradients(bias_B2, share_b1, tf32=products != "exact")

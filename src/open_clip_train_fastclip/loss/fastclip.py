"""FastCLIPLoss: one step of Algorithm 1 of FastCLIP (arXiv 2407.01445), for any training loop.

Shapes: b pairs of this rank, B = K*b pairs of the global batch over K ranks, d width of the embedding,
C columns of the per-sample table. Suffix _b2 and _B2: column 0 belongs to image anchors, column 1 to text anchors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import functional
from .collectives import Collectives
from .config import GCL_WITHOUT_TAU, RGCL_G, FastCLIPConfig
from .figures import step_figures
from .own_tensors import SavedElsewhere
from .sample_table import SampleTable
from .schedules import gamma_at
from .step import Before, Contrast, Step, Update
from .temperature import GlobalTemperature, move_individual, tau_lr_at


class FastCLIPLoss(SavedElsewhere):
    """SogCLR, iSogCLR and FastCLIP v0 to v3 on L2-normalised features.

    Call `start_epoch(epoch)` before each epoch and the module once a step. The value is the objective of the paper
    with the running estimates u in place of g, the same on every rank; its gradient is the algorithm's estimator
    (not the value's derivative), scaled by K so that the mean over ranks, which DDP forms, is the global gradient.
    tau and u move inside the call; the value and the gradients use the step's old tau and its new u.
    A global batch with a non-finite feature leaves u, tau and its moments as they are, and `usable` says so: what it
    gives as gradients is no good either (nonfinite.NonfiniteGuard leaves out the optimizer's step, and calls
    undo_step() where only the gradients turn out not to be finite).

    World size and rank are those of torch.distributed if it is initialised when the module is made.
    """

    visited: Tensor  # 0-d, samples of the data set that have been seen
    mean_individual_tau: Tensor  # 0-d
    usable: Tensor  # 0-d bool: whether every feature of the last step was finite, the same on every rank
    skipped_steps: Tensor  # 0-d, steps that were not usable, since the loss was made

    def __init__(self, config: FastCLIPConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.collectives = Collectives()
        self.table = SampleTable(config, self.collectives)
        self.global_tau = None if config.individual_tau else GlobalTemperature(config)
        self.own("visited", torch.zeros((), dtype=torch.int64))
        self.own("mean_individual_tau", torch.tensor(config.temperature, dtype=torch.float64))
        self.own("usable", torch.ones((), dtype=torch.bool))
        self.own("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.step = 0  # steps done, the clock of tau_lr's cosine
        self._last_rows_BC: Tensor | None = None  # new rows of the last step, for metrics()
        self.start_epoch(0)
        self.to(device)

    # ---------------------------------------------------------------- what a training loop calls

    def start_epoch(self, epoch: int) -> None:
        """Set gamma for `epoch` (0-based), before its first step; an unfinished step is forgotten."""
        c = self.config
        self.epoch = epoch
        self.gamma = gamma_at(epoch, c.gamma_schedule, c.gamma, c.gamma_decay_epochs)
        self._step: Step | None = None

    def begin_step(self, sample_ids: Tensor) -> None:
        """Announce the ids [b] (int64) of the coming step, so that their rows are fetched while the model runs.

        With gradient accumulation over A micro-batches these are the A*b ids of the whole step, and the module is
        then called A times: the first call moves u and tau, the others reuse the new u and the step's old tau.
        Ids on the CPU are checked. Raises UserError for ids outside 0 .. N-1 and for a global batch of one pair.
        """
        self._fetch_rows(sample_ids, announced=True)

    def forward(self, image_features: Tensor, text_features: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Value of the objective, 0-d, for features [b, d] and, unless begin_step announced them, ids [b] int64.

        Ids that were announced may be passed again: the same tensor, since comparing two on a GPU waits for it.
        In eval mode and without gradients (torch.no_grad) nothing moves: the value is what a step would have now.
        """
        if not self.training or not torch.is_grad_enabled():
            with self._aside(sample_ids):
                return self._apply_objective(image_features, text_features)
        if sample_ids is not None and not self._announced(sample_ids):
            self._fetch_rows(sample_ids, announced=False)
        return self._apply_objective(image_features, text_features)

    def _apply_objective(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        if self._step is None:
            raise UserError("the loss does not know the samples of this step: pass sample_ids or call begin_step")
        if image_features.shape != text_features.shape or len(image_features) != len(self._step.ids_b):
            raise UserError(
                f"image features {tuple(image_features.shape)} and text features {tuple(text_features.shape)} do not "
                f"fit {len(self._step.ids_b)} sample ids: give one row of each modality a sample"
            )
        value: Tensor = _Objective.apply(image_features, text_features, self)
        return value

    def undo_step(self) -> None:
        """Put u and tau back to where they were before the last step, since the model did not move in it.

        The step counts as one that was not usable; the clock of tau_lr goes on.
        """
        step = self._step
        if step is None or step.update is None:
            return
        before = step.update.before
        self.table.write(step.ids_B, before.rows_BC)
        self.visited, self.mean_individual_tau = before.visited, before.mean_individual_tau
        if self.global_tau is not None:
            self.global_tau.put(before.global_tau)
        self._last_rows_BC = before.rows_BC
        self.skipped_steps += self.usable
        self.usable = torch.zeros_like(self.usable)

    @property
    def temperature(self) -> Tensor:
        """tau in force, 0-d: the global one, or the mean of the individual ones over all samples and modalities."""
        return self.mean_individual_tau if self.global_tau is None else self.global_tau.tau()

    def full_state(self) -> dict[str, Tensor]:
        """Every column of the per-sample table over all N samples, on the CPU of every rank (collective)."""
        return self.table.full()

    def metrics(self) -> dict[str, float]:
        """Figures of the last step for a log line: tau, gamma, tau_lr, log u, share of samples visited.

        skipped_steps: how many steps had a feature or gradient that is not finite, since the loss was made.
        """
        return step_figures(self, self._last_rows_BC)

    # ---------------------------------------------------------------- Algorithm 1, in order

    def _announced(self, sample_ids: Tensor) -> bool:
        step = self._step
        if step is None or not step.announced or step.ids_b.device != sample_ids.device:
            return False
        return step.ids_b is sample_ids or torch.equal(step.ids_b, sample_ids)

    def _fetch_rows(self, sample_ids: Tensor, announced: bool) -> None:
        """Gather the ids of the global batch and begin to fetch their rows of the table."""
        if len(sample_ids) * self.collectives.world_size < 2:
            raise UserError("a global batch of 1 pair has nothing to compare it with: use a batch size of 2 or more")
        if not sample_ids.is_cuda and not 0 <= sample_ids.min() <= sample_ids.max() < self.table.num_samples:
            raise UserError(
                f"sample ids from {sample_ids.min().item()} to {sample_ids.max().item()} do not fit a table of "
                f"{self.table.num_samples} samples: set num_samples to the largest id + 1"
            )
        ids_B = self.collectives.gather(sample_ids.to(self.table.rows.device, torch.int64, non_blocking=True))
        last_B, copies_B = functional.last_copies(ids_B)
        self._step = Step(sample_ids, ids_B, last_B, copies_B, self.table.read(ids_B), announced)

    @contextmanager
    def _aside(self, sample_ids: Tensor | None) -> Iterator[None]:
        """A step that moves nothing. One that is announced or under way stays, and lends its ids if none are given."""
        pending = self._step
        if sample_ids is None and pending is not None:
            sample_ids = pending.ids_b
        try:
            if sample_ids is not None:
                self._fetch_rows(sample_ids, announced=False)
                self._current.moves = False
            yield
        finally:
            self._step = pending

    def _evaluate(self, image_bd: Tensor, text_bd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value and the gradients of this rank's features, [b, d] each; called without autograd."""
        step = self._current
        with functional.exact_products(image_bd.device):
            if step.update is None:
                rows_BC = step.rows()
                tau_B2 = self._tau_of(rows_BC)
                contrast = self._contrast_with_global_batch(image_bd, text_bd, tau_B2)
                step.update, diagonal_B = self._move_u_and_tau(contrast, rows_BC, tau_B2)
            else:
                contrast = self._contrast_with_global_batch(image_bd, text_bd, step.update.tau_B2)
                diagonal_B = self.collectives.gather(contrast.diagonal_b)
                self._update_usable(diagonal_B, self.usable)
            image_gradient_bd, text_gradient_bd = self._feature_gradients(contrast, step.update, diagonal_B)
        return step.update.value, image_gradient_bd, text_gradient_bd

    @property
    def _current(self) -> Step:
        assert self._step is not None  # forward() has made sure of it
        return self._step

    def _tau_of(self, rows_BC: Tensor) -> Tensor:
        if self.global_tau is None:
            return rows_BC[:, 2:4]
        return self.global_tau.tau().expand(len(rows_BC), 2)

    def _own(self, values_B: Tensor) -> Tensor:
        b = len(self._current.ids_b)
        return values_B[self.collectives.rank * b : (self.collectives.rank + 1) * b]

    def _contrast_with_global_batch(self, image_bd: Tensor, text_bd: Tensor, tau_B2: Tensor) -> Contrast:
        """Gather the features, packed and in the dtype they have; log g of the local anchors of both modalities."""
        step, d = self._current, image_bd.shape[1]
        everything = self.collectives.gather(torch.cat([image_bd, text_bd], dim=1))
        everything = everything.to(torch.promote_types(everything.dtype, torch.float32))
        image_Bd, text_Bd = everything[:, :d], everything[:, d:]
        image_bd, text_bd = self._own(image_Bd), self._own(text_Bd)
        diagonal_b = torch.linalg.vecdot(image_bd, text_bd)
        last_b, tau_b2 = self._own(step.last_B), self._own(tau_B2).to(everything.dtype)
        image_logits = functional.Logits(image_bd, tau_b2[:, 0], text_Bd, last_b, step.last_B)
        both = [functional.log_g(image_logits, diagonal_b)]
        if self.collectives.world_size == 1:
            text_logits = image_logits.transposed(tau_b2[:, 1])
        else:
            text_logits = functional.Logits(text_bd, tau_b2[:, 1], image_Bd, last_b, step.last_B)
        both.append(functional.log_g(text_logits, diagonal_b))
        log_g_b2, mean_h_b2 = (torch.stack(pair, dim=1) for pair in zip(*both, strict=True))
        return Contrast((image_bd, text_bd), (image_logits, text_logits), diagonal_b, log_g_b2, mean_h_b2)

    def _move_u_and_tau(self, contrast: Contrast, rows_BC: Tensor, tau_B2: Tensor) -> tuple[Update, Tensor]:
        """New u and, by the loss's rule, new tau: computed where the anchor lives, then known and stored everywhere.

        Returns what later calls reuse, and the diagonal of the global batch [B], which travels along.
        """
        step, c, dtype = self._current, self.config, rows_BC.dtype
        old_b = self._own(rows_BC)
        log_u_b2 = functional.updated_log_u(old_b[:, :2], contrast.log_g_b2.to(dtype), self.gamma)
        log_eps_u_b2 = functional.log_weight_denominator(log_u_b2, c.eps)
        # tau d_tau g / (eps + u) of each anchor
        slope_b2 = -contrast.mean_h_b2.to(dtype) * (contrast.log_g_b2.to(dtype) - log_eps_u_b2).exp()
        columns = [log_u_b2, contrast.diagonal_b.to(dtype)[:, None]]
        if c.individual_tau:
            rate = tau_lr_at(c, self.step, self.temperature.to(dtype))
            tau_b2, m_b2, v_b2 = (old_b[:, first : first + 2] for first in (2, 4, 6))
            columns += move_individual(c, tau_b2, m_b2, v_b2, log_eps_u_b2 + c.rho + slope_b2, rate, self.epoch)
        packed_bC = torch.cat(columns, dim=1)
        # Copies of a sample all take the values of the last one, so it stands for them in the sum as well.
        slope = (slope_b2.sum(1) * self._own(step.copies_B)).sum()
        new_BC, slope = self._exchange(packed_bC, slope)
        diagonal_B, new_BC = new_BC[:, 2], torch.cat([new_BC[:, :2], new_BC[:, 3:]], dim=1)[step.last_B]
        usable = self._update_usable(diagonal_B, torch.ones_like(self.usable))

        log_eps_u_B2 = functional.log_weight_denominator(new_BC[:, :2], c.eps)
        global_tau = () if self.global_tau is None else self.global_tau.state
        before = Before(rows_BC, self.visited, self.mean_individual_tau, global_tau)
        update = Update(tau_B2, log_eps_u_B2, self._value(tau_B2, log_eps_u_B2), before)
        if step.moves and self.global_tau is not None and c.learns_global_tau:
            mean_log_u, mean_log_eps_u = new_BC[:, :2].sum(1).mean(), log_eps_u_B2.sum(1).mean()
            gradient = self.global_tau.gradient(slope / len(new_BC), mean_log_u, mean_log_eps_u)
            self.global_tau.move(gradient, tau_lr_at(c, self.step, self.global_tau.tau()), usable)
        self._store(rows_BC, torch.where(usable, new_BC, rows_BC))
        return update, diagonal_B

    def _exchange(self, packed_bC: Tensor, scalar: Tensor) -> tuple[Tensor, Tensor]:
        """One all-gather of the new values of every anchor and of a scalar: [B, C] and the scalar's sum."""
        b, C = packed_bC.shape
        packed = torch.cat([packed_bC.reshape(-1), scalar[None]])[None]
        everything = self.collectives.gather(packed)
        return everything[:, :-1].reshape(-1, C), everything[:, -1].sum()

    def _update_usable(self, diagonal_B: Tensor, usable: Tensor) -> Tensor:
        """`usable` of the step after a call with this diagonal, given what it was before the call."""
        if not self._current.moves:
            return torch.zeros_like(usable)
        self.usable = usable & diagonal_B.isfinite().all()  # any non-finite feature shows in its pair's diagonal
        self.skipped_steps += usable ^ self.usable
        return self.usable

    def _value(self, tau_B2: Tensor, log_eps_u_B2: Tensor) -> Tensor:
        """The objective: GCL, its form without the factor tau (v0), RGCL (v2, isogclr) or RGCL-g (v3)."""
        c = self.config
        if c.algorithm.objective == GCL_WITHOUT_TAU:
            return log_eps_u_B2.sum(1).mean()
        value = (tau_B2 * (log_eps_u_B2 + (c.rho if c.individual_tau else 0.0))).sum(1).mean()
        return value + 2 * c.rho * tau_B2[0, 0] if c.algorithm.objective == RGCL_G else value

    def _store(self, old_BC: Tensor, new_BC: Tensor) -> None:
        """Write the new rows and keep the counts of metrics() up to date."""
        step = self._current
        if not step.moves:
            return
        self.table.write(step.ids_B, new_BC)
        last_B = step.copies_B > 0
        first_visit_B = torch.isneginf(old_BC[:, 0]) & ~torch.isneginf(new_BC[:, 0])
        self.visited = self.visited + (first_visit_B & last_B).sum()
        if self.config.individual_tau:
            moved = ((new_BC - old_BC)[:, 2:4].sum(1) * last_B).sum()
            self.mean_individual_tau = self.mean_individual_tau + moved / (2 * self.config.num_samples)
        self._last_rows_BC = new_BC
        self.step += 1

    def _feature_gradients(self, contrast: Contrast, update: Update, diagonal_B: Tensor) -> tuple[Tensor, Tensor]:
        """K times this rank's part of G_w: its anchors against everybody, everybody's anchors against its items."""
        c, objective, B = self.config, self.config.algorithm.objective, len(diagonal_B)
        tau_B2, dtype = update.tau_B2, contrast.items[0].dtype
        factor = self.collectives.world_size / B
        if c.gradients == "released":
            factor_B2 = factor / 2 * (torch.ones_like(tau_B2) if objective == RGCL_G else 1 / tau_B2)
        else:
            factor_B2 = factor * (1 / tau_B2 if objective == GCL_WITHOUT_TAU else torch.ones_like(tau_B2))
        log_factor_B2 = factor_B2.log() - update.log_eps_u_B2
        bias_B2 = (diagonal_B[:, None] / tau_B2 + math.log(B - 1) - log_factor_B2).to(dtype)
        # The anchors' own pair is in every exponent; its share is the sum of the weights, known from g.
        share_b1 = (contrast.log_g_b2 + self._own(log_factor_B2)).exp().sum(1, keepdim=True).to(dtype)
        gradients = []
        for a in (0, 1):
            other_tau_B = tau_B2[:, 1 - a].to(dtype) if c.individual_tau else None
            gradient_bd = functional.feature_gradient(
                contrast.logits[a], self._own(bias_B2)[:, a], bias_B2[:, 1 - a], other_tau_B
            )
            gradients.append(gradient_bd.sub_(share_b1 * contrast.items[1 - a]))
        return gradients[0], gradients[1]

    # ---------------------------------------------------------------- saving and loading

    def tau_state(self) -> dict[str, float]:
        """The global temperature and its moments as plain floats; empty with individual temperatures."""
        if self.global_tau is None:
            return {}
        return {name: getattr(self.global_tau, name).item() for name in GlobalTemperature.NAMES}

    def load_tau_state(self, state: dict[str, float]) -> None:
        """Put back what tau_state() gave."""
        for name, value in state.items():
            getattr(self.global_tau, name).fill_(value)

    def recount(self) -> None:
        """Count visited samples and the mean individual tau anew (collective), after rows were put into the table."""
        self.visited.copy_(self.table.num_visited())
        if self.config.individual_tau:
            self.mean_individual_tau.copy_(self.table.mean_tau())


class _Objective(torch.autograd.Function):
    """The value with the gradients that were written down instead of traced."""

    @staticmethod
    def forward(ctx: Any, image_bd: Tensor, text_bd: Tensor, loss: FastCLIPLoss) -> Tensor:
        value, *gradients = loss._evaluate(image_bd, text_bd)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = image_bd.dtype, text_bd.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        # The scale of a GradScaler is applied before rounding to a half-precision dtype.
        scaled = ((g * grad_value).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None

"""FastCLIPLoss: one step of Algorithm 1 of FastCLIP (arXiv 2407.01445), for any training loop.

Shapes: b pairs of this rank, B = K*b pairs of the global batch over K ranks, d width of the embedding,
C columns of the per-sample table. Suffix _b2 and _B2: column 0 belongs to image anchors, column 1 to text anchors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import functional, moves
from .collectives import Collectives, gather_packed
from .config import FastCLIPConfig
from .figures import step_figures
from .own_tensors import SavedElsewhere
from .parts import Parts, State
from .precision import default_products
from .sample_table import SampleTable
from .schedules import gamma_at
from .step import LastStep, Step, Update
from .temperature import GlobalTemperature, peak_tau_lr_at


class FastCLIPLoss(SavedElsewhere):
    """SogCLR, iSogCLR and FastCLIP v0 to v3 on L2-normalised features.

    Call `start_epoch(epoch)` before each epoch and the module once a step. The value is the objective of the paper
    with the running estimates u in place of g, the same on every rank; its gradient is the algorithm's estimator
    (not the value's derivative), scaled by K so that the mean over ranks, which DDP forms, is the global gradient.
    tau and u move inside the call; the value and the gradients use the step's old tau and its new u.
    A global batch with a non-finite feature leaves u, tau and its moments as they are, and `usable` says so: what it
    gives as gradients is no good either (nonfinite.NonfiniteGuard leaves out the optimizer's step, and calls
    undo_step() where only the gradients turn out not to be finite).

    World size and rank are those of torch.distributed if it is initialised when the module is made. On a GPU the parts
    of a step are recorded (recorded.py): clone the tensors below to keep what they are now.
    """

    visited: Tensor  # 0-d, samples of the data set that have been seen
    mean_individual_tau: Tensor  # 0-d
    usable: Tensor  # 0-d bool: whether every feature of the last step was finite, the same on every rank
    skipped_steps: Tensor  # 0-d, steps that were not usable, since the loss was made
    _tau_lr: Tensor
    _epoch_numbers: Tensor

    def __init__(self, config: FastCLIPConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config = config if config.products else replace(config, products=default_products(device))
        self.collectives = Collectives()
        self.table = SampleTable(config, self.collectives)
        self._parts = Parts(config, self.table, recorded=True)
        self._parts_aside = Parts(config, self.table, recorded=False)
        self.global_tau = None if config.individual_tau else GlobalTemperature(config)
        self.own("visited", torch.zeros((), dtype=torch.int64))
        self.own("mean_individual_tau", torch.tensor(config.temperature, dtype=torch.float64))
        self.own("usable", torch.ones((), dtype=torch.bool))
        self.own("skipped_steps", torch.zeros((), dtype=torch.int64))
        self.step = 0  # steps done, the clock of tau_lr's cosine
        self._last: LastStep | None = None
        self.own("_tau_lr", torch.tensor(config.tau_lr, dtype=config.table_dtype))
        self.own("_epoch_numbers", torch.empty(0))
        self.to(device)
        self.start_epoch(0)

    # ---------------------------------------------------------------- what a training loop calls

    def start_epoch(self, epoch: int) -> None:
        """Set gamma for `epoch` (0-based), before its first step; an unfinished step is forgotten."""
        c = self.config
        self.epoch = epoch
        self.gamma = gamma_at(epoch, c.gamma_schedule, c.gamma, c.gamma_decay_epochs)
        self._epoch_numbers = moves.epoch_numbers(c, epoch, self.gamma).to(self.table.rows.device)
        self._step: Step | None = None

    def begin_step(self, sample_ids: Tensor) -> None:
        """Announce the ids [b] (int64) of the coming step, so that their rows are fetched while the model runs.

        With gradient accumulation over A micro-batches these are the A*b ids of the whole step, and the module is
        then called A times: the first call moves u and tau, the others reuse the new u and the step's old tau.
        Ids on the CPU are checked. Raises UserError for ids outside 0 .. N-1 and for a global batch of one pair.
        """
        self._fetch_rows(sample_ids, announced=True, moves=True)

    def forward(self, image_features: Tensor, text_features: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Value of the objective, 0-d, for features [b, d] and, unless begin_step announced them, ids [b] int64.

        Ids that were announced may be passed again: the same tensor, since comparing two on a GPU waits for it.
        In eval mode and without gradients (torch.no_grad) nothing moves: the value is what a step would have now.
        """
        if not self.training or not torch.is_grad_enabled():
            with self._aside(sample_ids):
                return self._apply_objective(image_features, text_features)
        if sample_ids is not None and not self._announced(sample_ids):
            self._fetch_rows(sample_ids, announced=False, moves=True)
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

    def undo_step(self, where: Tensor | None = None) -> None:
        """Put u and tau back to where they were before the last step, since the model did not move in it.

        The step counts as one that was not usable; the clock of tau_lr goes on. where: 0-d bool; given, only if it is
        True, which the host need not know.
        """
        step = self._step
        if step is None or step.update is None or self._last is None:
            return
        where = torch.ones_like(self.usable) if where is None else where
        rows_BC, state, self.usable = step.parts.undo(
            where, step.update.rows_BC, self._last.rows_BC, step.update.before, self._state, self.usable
        )
        self.table.write(step.places_B, rows_BC)
        self._last = self._last._replace(rows_BC=rows_BC)
        self._put(state)

    @property
    def temperature(self) -> Tensor:
        """tau in force, 0-d: the global one, or the mean of the individual ones over all samples and modalities."""
        return self.mean_individual_tau.clone() if self.global_tau is None else self.global_tau.tau()

    def full_state(self) -> dict[str, Tensor]:
        """Every column of the per-sample table over all N samples, on the CPU of every rank (collective)."""
        return self.table.full()

    def metrics(self) -> dict[str, float]:
        """Figures of the last step for a log line: tau, gamma, tau_lr, log u, share of samples visited.

        skipped_steps: how many steps had a feature or gradient that is not finite, since the loss was made. u_lag: the
        mean of log u - log g with u as it was before the step, over the anchors of this rank that had been seen before.
        """
        return step_figures(self, self._last)

    # ---------------------------------------------------------------- Algorithm 1, in order

    def _announced(self, sample_ids: Tensor) -> bool:
        step = self._step
        if step is None or not step.announced or step.ids_b.device != sample_ids.device:
            return False
        return step.ids_b is sample_ids or torch.equal(step.ids_b, sample_ids)

    def _fetch_rows(self, sample_ids: Tensor, announced: bool, moves: bool) -> None:
        """Gather the ids of the global batch and begin to fetch their rows of the table."""
        if len(sample_ids) * self.collectives.world_size < 2:
            raise UserError("a global batch of 1 pair has nothing to compare it with: use a batch size of 2 or more")
        if not sample_ids.is_cuda:
            lowest, highest = (bound.item() for bound in sample_ids.aminmax())
            if lowest < 0 or highest >= self.table.num_samples:
                raise UserError(
                    f"sample ids from {lowest} to {highest} do not fit a table of {self.table.num_samples} samples: "
                    "set num_samples to the largest id + 1"
                )
        ids_B = self.collectives.gather(sample_ids.to(self.table.rows.device, torch.int64, non_blocking=True))
        # What is recorded would be overwritten in the midst of a step.
        parts = self._parts if moves else self._parts_aside
        # They nearly always are, but a GPU's host would have to wait to know it.
        distinct = ids_B.device.type == "cpu" and functional.are_distinct(ids_B)
        places_B, copies = parts.look_up(ids_B, distinct)
        self._step = Step(sample_ids, places_B, copies, self.table.read(places_B), announced, moves, parts)

    @contextmanager
    def _aside(self, sample_ids: Tensor | None) -> Iterator[None]:
        """A step that moves nothing. One that is announced or under way stays, and lends its ids if none are given."""
        pending = self._step
        if sample_ids is None and pending is not None:
            sample_ids = pending.ids_b
        try:
            if sample_ids is not None:
                self._fetch_rows(sample_ids, announced=False, moves=False)
            yield
        finally:
            self._step = pending

    def _evaluate(self, image_bd: Tensor, text_bd: Tensor) -> tuple[Tensor, Tensor]:
        """Value and the gradients [2, b, d] of this rank's features; called without autograd."""
        features_B2d = self.collectives.gather(torch.stack([image_bd, text_bd], dim=1))
        features_B2d = features_B2d.to(torch.promote_types(features_B2d.dtype, torch.float32))
        if self._current.update is None:
            gradients_2bd = self._first_call(features_B2d)
        else:
            gradients_2bd = self._later_call(features_B2d, self._current.update)
        assert self._current.update is not None  # the first call has made it
        return self._current.update.value, gradients_2bd

    @property
    def _current(self) -> Step:
        assert self._step is not None  # forward() has made sure of it
        return self._step

    def _first_call(self, features_B2d: Tensor) -> Tensor:
        """The gradients. u and tau move: computed where the anchor lives, then known and stored everywhere."""
        step, rate, numbers = self._current, self._peak_tau_lr(), self._epoch_numbers
        parts, rows_BC = step.parts, step.rows()
        compared = parts.compare(features_B2d, rows_BC, step.copies, self._global_numbers, numbers, rate)
        local = compared.local
        slope = () if local.slope is None else (local.slope,)
        diagonal_b = compared.contrast.diagonal_b.to(rows_BC.dtype)
        diagonal_B, *columns_B2 = gather_packed(self.collectives, diagonal_b, local.log_u_b2, *local.tau, *slope)
        slopes_K = columns_B2.pop() if slope else None
        moved, before, state, gradients_2bd = parts.conclude(
            diagonal_B, tuple(columns_B2), slopes_K, compared, rows_BC, step.copies, self._state, numbers, rate
        )
        step.update = Update(compared.tau, moved.log_eps_u_B2, moved.value, rows_BC, before)
        if step.moves:
            self.table.write(step.places_B, moved.rows_BC)
            self._last = LastStep(moved.rows_BC, rows_BC[compared.contrast.own, :2], local.log_g_b2)
            self.usable = moved.usable
            self._put(state)
            self.step += 1
        return gradients_2bd

    def _later_call(self, features_B2d: Tensor, update: Update) -> Tensor:
        """The gradients, with the u and tau of the first call."""
        step, parts = self._current, self._current.parts
        contrast, log_g_b2 = parts.compare_again(features_B2d, update.tau, step.copies)
        diagonal_B = self.collectives.gather(contrast.diagonal_b)
        if step.moves:
            usable = self.usable & moves.is_usable(diagonal_B)
            self.skipped_steps = self.skipped_steps + (usable ^ self.usable)
            self.usable = usable
        return parts.conclude_again(diagonal_B, update.log_eps_u_B2, log_g_b2, update.tau, contrast)

    def _put(self, state: State) -> None:
        self.visited, self.mean_individual_tau, self.skipped_steps, numbers = state
        if self.global_tau is not None and numbers is not None:
            self.global_tau.numbers = numbers

    @property
    def _state(self) -> State:
        return State(self.visited, self.mean_individual_tau, self.skipped_steps, self._global_numbers)

    @property
    def _global_numbers(self) -> Tensor | None:
        return None if self.global_tau is None else self.global_tau.numbers

    def _peak_tau_lr(self) -> Tensor:
        if self.config.tau_lr_schedule != "cosine":
            return self._tau_lr
        return torch.full_like(self._tau_lr, peak_tau_lr_at(self.config, self.step))

    # ---------------------------------------------------------------- saving and loading

    def tau_state(self) -> dict[str, float]:
        """The global temperature and its moments as plain floats; empty with individual temperatures."""
        if self.global_tau is None:
            return {}
        return dict(zip(GlobalTemperature.NAMES, self.global_tau.numbers.tolist(), strict=True))

    def load_tau_state(self, state: dict[str, float]) -> None:
        """Put back what tau_state() gave."""
        if self.global_tau is not None:
            for name, value in state.items():
                self.global_tau.numbers[GlobalTemperature.NAMES.index(name)] = value

    def recount(self) -> None:
        """Count visited samples and the mean individual tau anew (collective), after rows were put into the table."""
        self.visited.copy_(self.table.num_visited())
        if self.config.individual_tau:
            self.mean_individual_tau.copy_(self.table.mean_tau())


class _Objective(torch.autograd.Function):
    """The value with the gradients that were written down instead of traced."""

    @staticmethod
    def forward(ctx: Any, image_bd: Tensor, text_bd: Tensor, loss: FastCLIPLoss) -> Tensor:
        with torch.autocast(image_bd.device.type, enabled=False):
            value, gradients_2bd = loss._evaluate(image_bd, text_bd)
        if gradients_2bd.is_cuda:
            gradients_2bd = gradients_2bd.clone()  # the next call overwrites what was recorded
        ctx.save_for_backward(gradients_2bd)
        ctx.dtypes = image_bd.dtype, text_bd.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        # The scale of a GradScaler is applied before rounding to a half-precision dtype.
        scaled_2bd = ctx.saved_tensors[0] * grad_value
        return *(gradient.to(dtype) for gradient, dtype in zip(scaled_2bd, ctx.dtypes, strict=True)), None

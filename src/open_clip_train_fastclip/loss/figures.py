"""What a log line says of the last step of a FastCLIPLoss."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .temperature import peak_tau_lr_at, tau_lr_at

if TYPE_CHECKING:
    from .fastclip import FastCLIPLoss


def step_figures(loss: "FastCLIPLoss", rows_BC: Tensor | None) -> dict[str, float]:
    """See FastCLIPLoss.metrics(). rows_BC: those of the last step; no log u if no sample of it has been seen yet."""
    config, tau = loss.config, loss.temperature
    figures = {"tau": tau.item(), "gamma": loss.gamma, "visited": loss.visited.item() / config.num_samples}
    figures["skipped_steps"] = loss.skipped_steps.item()
    learned = config.learns_global_tau or config.individual_tau
    peak = torch.full_like(tau, peak_tau_lr_at(config, max(loss.step - 1, 0)))
    figures["tau_lr"] = tau_lr_at(config, peak, tau).item() if learned else 0.0
    if rows_BC is None:
        return figures
    log_u = rows_BC[:, :2]
    log_u = log_u[log_u.isfinite()]  # a batch with a bad feature may hold unvisited samples
    if len(log_u) > 1:
        figures |= {"log_u_mean": log_u.mean().item(), "log_u_std": log_u.std().item()}
    if config.individual_tau:
        figures["tau_std"] = rows_BC[:, 2:4].std().item()
    return figures

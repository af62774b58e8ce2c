"""What a log line says of the last step of a FastCLIPLoss."""

from typing import TYPE_CHECKING

import torch

from .step import LastStep
from .temperature import peak_tau_lr_at, tau_lr_at

if TYPE_CHECKING:
    from .fastclip import FastCLIPLoss


def step_figures(loss: "FastCLIPLoss", last: LastStep | None) -> dict[str, float]:
    """See FastCLIPLoss.metrics(). No log u if no sample of the last step has been seen yet, no lag if none before."""
    config, tau = loss.config, loss.temperature
    figures = {"tau": tau.item(), "gamma": loss.gamma, "visited": loss.visited.item() / config.num_samples}
    figures["skipped_steps"] = loss.skipped_steps.item()
    learned = config.learns_global_tau or config.individual_tau
    peak = torch.full_like(tau, peak_tau_lr_at(config, max(loss.step - 1, 0)))
    figures["tau_lr"] = tau_lr_at(config, peak, tau).item() if learned else 0.0
    if last is None:
        return figures
    log_u = last.rows_BC[:, :2]
    log_u = log_u[log_u.isfinite()]  # a batch with a bad feature may hold unvisited samples
    if len(log_u) > 1:
        figures |= {"log_u_mean": log_u.mean().item(), "log_u_std": log_u.std().item()}
    lag = last.log_u_before_b2 - last.log_g_b2
    lag = lag[lag.isfinite()]  # it is not at a first visit, nor where g has no negatives
    if len(lag):
        figures["u_lag"] = lag.mean().item()
    if config.individual_tau:
        figures["tau_std"] = last.rows_BC[:, 2:4].std().item()
    return figures

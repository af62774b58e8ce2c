"""The figures that are read from a run's log."""

from benchmarks.experiments.run_log import final_temperature, final_u

LINE = "2026-11-27,09:00:00 | INFO | FastCLIP Epoch: {} step: {} tau: {} gamma: 0.7 visited: 1 skipped_steps: 0 "
LOG = "\n".join(
    (LINE + "tau_lr: 0.0001 log_u_mean: {} log_u_std: {} u_lag: {}").format(*figures)
    for figures in [(0, 10, 0.07, -1, 1, "nan"), (1, 20, 0.06, -3.5, 1.5, 0.5), (1, 30, 0.05, -4.5, 2.5, 1e-05)]
)


def test_u_is_the_mean_over_the_last_epoch_and_tau_the_last_line():
    assert final_u(LOG) == {"log_u_mean": -4.0, "log_u_std": 2.0, "u_lag": 0.25}
    assert final_temperature(LOG) == 0.05
    assert final_u("Train Epoch: 1 [ 32/64 (50%)]") == {}

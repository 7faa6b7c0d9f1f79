"""What differential privacy costs: budgets, noise, and whether noise leaves anything to learn."""

from confrere.privacy.accounting import (
    calibrate_sigma,
    check_delta,
    epsilon,
    finite,
    noise_ratio,
    noise_verdict,
    refuse_hopeless,
    sites_needed,
    statement,
)

__all__ = [
    "calibrate_sigma",
    "check_delta",
    "epsilon",
    "finite",
    "noise_ratio",
    "noise_verdict",
    "refuse_hopeless",
    "sites_needed",
    "statement",
]

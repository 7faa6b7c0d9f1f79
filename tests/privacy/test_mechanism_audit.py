"""G23: a one-run audit of the noisy steps themselves, by a thousand records that each pull at a number of their own.

A canary's gradient points along one axis, ten clips long; each is in the data by a fair coin. Whoever sees every step
guesses the coins from the sums along the axes. From how many are right follows a lower bound of epsilon
(:mod:`confrere.audits.canary`), which must stay below what the accountant says, and not where a bug is planted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from confrere.audits.canary import lower_bound
from confrere.privacy import calibrate_sigma
from confrere.privacy.mechanism import Mechanism, clipped_sum, draw, noisy_mean
from confrere.privacy.noise import Source
from confrere.seeds import numpy_generator

CANARIES, STEPS, RATE, DELTA = 1000, 4, 0.5, 1e-5
Sum = Callable[..., dict[str, Tensor]]


def pulled(params: dict[str, Tensor], axis: Tensor, target: Tensor) -> Tensor:
    """Return a loss whose gradient is ten along the canary's axis: of the head for one half of them."""
    number = axis.reshape(())
    where = torch.arange(CANARIES)
    pull = 10.0 * (where == number)
    return (torch.cat([params["adapter"], params["head"]]) * pull).sum()


def unclipped(*given: Any) -> dict[str, Tensor]:
    return clipped_sum(*given[:-1], 1e9)


def head_unclipped(*given: Any) -> dict[str, Tensor]:
    return {**clipped_sum(*given), "head": unclipped(*given)["head"]}


def audited(sigma: float, seed: int, total: Sum = clipped_sum) -> float:
    """Return the bound for one training."""
    included = numpy_generator(seed, "coins").random(CANARIES) < 0.5
    rows = np.flatnonzero(included)
    mechanism = Mechanism(unit="record", units=len(rows), rate=RATE, sigma=sigma, clip=1.0, noise_seed=seed + 1)
    params = {name: torch.zeros(CANARIES // 2) for name in ("adapter", "head")}
    seen = torch.zeros(CANARIES)
    for step in range(STEPS):
        source = Source(mechanism.noise_seed, "audit", step)
        drawn, counts = draw(mechanism, rows, rows, source)
        axes = torch.from_numpy(drawn)
        found = noisy_mean(total(pulled, {}, params, axes, axes, torch.from_numpy(counts), 1.0), mechanism, source)
        seen += torch.cat([found["adapter"], found["head"]])
    return lower_bound(seen.double().numpy(), included, DELTA)


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0])
@pytest.mark.slow
def test_the_bound_stays_below_what_is_promised(epsilon: float) -> None:
    sigma = calibrate_sigma(epsilon, rounds=STEPS, delta=DELTA, rate=RATE)
    found = [audited(sigma, seed) for seed in range(5)]
    print(f"\nG23: epsilon {epsilon:g}: at least {np.mean(found):.2f} (five seeds)")
    # Each bound may fail in one of twenty audits.
    assert sorted(found)[-2] <= epsilon
    assert epsilon < 4 or max(found) > 0.5, "the audit sees nothing"


BUGS: dict[str, Callable[[float], float]] = {
    "noise off": lambda sigma: audited(1e-9, 0),
    "a quarter of the noise": lambda sigma: audited(sigma / 4, 0),
    "clip omitted": lambda sigma: audited(sigma, 0, total=unclipped),
    "head not clipped": lambda sigma: audited(sigma, 0, total=head_unclipped),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_flagged_at_epsilon_1(bug: str) -> None:
    found = BUGS[bug](calibrate_sigma(1.0, rounds=STEPS, delta=DELTA, rate=RATE))
    print(f"\nG23: {bug}: at least {found:.2f}")
    assert found > (3.0 if bug == "noise off" else 1.0)

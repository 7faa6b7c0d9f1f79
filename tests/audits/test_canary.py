"""The lower bound of epsilon: against counting by hand, and on mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from confrere.audits import canary
from confrere.audits.canary import least_epsilon, lower_bound, p_value
from confrere.errors import ConfigError


@settings(max_examples=30)
@given(st.integers(1, 25), st.integers(0, 25), st.floats(0, 4), st.floats(0, 1e-2))
def test_p_is_what_a_slow_sum_gives(guesses: int, correct: int, epsilon: float, delta: float) -> None:
    correct, m = min(correct, guesses), guesses + 5
    chances = [binom.pmf(v, guesses, 1 / (1 + math.exp(-epsilon))) for v in range(guesses + 1)]
    most = max((sum(chances[correct - i : correct]) / i for i in range(1, correct + 1)), default=0.0)
    slow = min(1.0, sum(chances[correct:]) + 2 * m * delta * most)
    assert p_value(epsilon, delta, correct, guesses, m) == pytest.approx(slow, abs=1e-9)


def test_the_ceiling_of_a_thousand_right_guesses() -> None:
    """G23: a thousand guesses, all right, prove no more than about ln(333) at 95 %."""
    assert least_epsilon(1000, 1000, 1000, 0.0) == pytest.approx(math.log(333), abs=0.01)
    assert least_epsilon(500, 1000, 1000, 0.0) == 0.0
    assert least_epsilon(0, 0, 1000, 0.0) == 0.0
    assert least_epsilon(1000, 1000, 1000, 1e-5) < least_epsilon(1000, 1000, 1000, 0.0)
    assert least_epsilon(10**7, 10**7, 10**7, 0.0, 0.999) < canary.MOST


def gaussian(m: int, sigma: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and coins of m canaries that each add 1 to a sum of their own, under Gaussian noise."""
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    return coins + sigma * rng.standard_normal(m), coins


def delta_of(epsilon: float, sigma: float) -> float:
    """Return the exact delta of the Gaussian mechanism of sensitivity 1 (Balle and Wang, 2018)."""
    a, b = 1 / (2 * sigma), epsilon * sigma
    return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b))


def sigma_of(epsilon: float, delta: float) -> float:
    low, high = 1e-2, 1e3
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if delta_of(epsilon, middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0])
def test_the_bound_stays_below_epsilon_and_not_far(epsilon: float) -> None:
    sigma = sigma_of(epsilon, 1e-5)
    found = [lower_bound(*gaussian(1000, sigma, seed), 1e-5) for seed in range(8)]
    assert sum(one > epsilon for one in found) <= 1  # each may, with chance 1 in 20
    assert np.mean(found) > 0.1 * epsilon


def test_noise_that_is_missing_or_too_small_is_found() -> None:
    """The positive controls of G23 at epsilon 1: no noise, and a quarter of it."""
    sigma = sigma_of(1.0, 1e-5)
    assert lower_bound(*gaussian(1000, 1e-9, 0), 1e-5) > 3.0
    assert min(lower_bound(*gaussian(1000, sigma / 4, seed), 1e-5) for seed in range(3)) > 1.0


def test_coins_that_decided_nothing_give_nothing() -> None:
    rng = np.random.default_rng(0)
    found = [lower_bound(rng.random(400), rng.random(400) < 0.5, 1e-5) for _ in range(200)]
    assert sum(one > 0 for one in found) <= 18  # 5 % of 200, and what chance adds to that


@pytest.mark.parametrize(
    ("scores", "coins"),
    [([1.0], [True]), ([1.0, 2.0], [True]), ([1.0, float("nan")], [True, False]), ([], [])],
)
def test_canaries_that_cannot_be_guessed_are_refused(scores: list[float], coins: list[bool]) -> None:
    with pytest.raises(ConfigError, match="canaries") as caught:
        lower_bound(np.array(scores), np.array(coins, bool), 1e-5)
    assert caught.value.code == "audit"

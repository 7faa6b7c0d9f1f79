"""Strengths and their intervals: against scikit-learn, exact mechanisms, and how often intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, laplace, norm
from sklearn.metrics import roc_auc_score

from confrere.audits import statistics
from confrere.audits.audit import Interval, Row

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@settings(max_examples=30)
@given(SCORES, SCORES)
def test_auc_is_that_of_scikit_learn_and_inside_its_interval(inside: list[int], outside: list[int]) -> None:
    found = statistics.auc(np.array(inside, float), np.array(outside, float))
    truth = roc_auc_score([1] * len(inside) + [0] * len(outside), inside + outside)
    assert found.value == pytest.approx(truth)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= truth + 1e-12
    assert truth - 1e-12 <= found.high <= 1
    swapped = statistics.auc(np.array(outside, float), np.array(inside, float))
    assert swapped.low == pytest.approx(1 - found.high)


@pytest.mark.parametrize(("m", "n", "shift"), [(8, 30, 0.0), (8, 30, 1.0), (5, 5, 2.5), (40, 200, 0.5)])
def test_the_interval_of_auc_holds_the_truth_as_often_as_it_says(m: int, n: int, shift: float) -> None:
    rng, truth, held = np.random.default_rng(m), norm.cdf(shift / math.sqrt(2)), 0
    for _ in range(400):
        found = statistics.auc(rng.normal(shift, 1, m), rng.normal(0, 1, n))
        held += found.low <= truth <= found.high  # type: ignore[operator]
    assert held / 400 >= 0.93


def test_few_members_who_all_score_highest_prove_little() -> None:
    found = statistics.auc(np.array([9.0, 9.0]), np.arange(5.0))
    assert found.value == 1.0
    assert found.low is not None
    assert found.low < 0.6
    assert statistics.auc(np.zeros(0), np.ones(3)) == Interval()


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(1, 40))
def test_proportions_are_exact(successes: int, trials: int) -> None:
    successes = min(successes, trials)
    found = statistics.proportion(successes, trials)
    truth = binomtest(successes, trials).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high))


def test_a_rate_that_too_few_others_can_show_is_undefined() -> None:
    assert statistics.tpr_at(np.ones(50), np.zeros(999), 0.001) == (Interval(), Interval())
    true, false = statistics.tpr_at(np.ones(50), np.zeros(1000), 0.001)
    assert true.value == 1.0
    assert false.value == 0.0
    assert false.high is not None
    assert 0.002 < false.high < 0.006


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_the_true_false_positive_rate_is_in_its_interval_whatever_the_scores_are(skew: float) -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        outside = rng.random(200) ** (1 + skew)
        _, false = statistics.tpr_at(outside, outside, 0.01)
        threshold = np.sort(outside)[200 - 3]
        held += false.low <= 1 - threshold ** (1 / (1 + skew)) <= false.high  # type: ignore[operator]
    assert 0.92 <= held / 200 <= 0.98


def test_advantage_is_zero_on_average_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    found = [statistics.advantage(rng.random(30), rng.random(30), seed) for seed in range(150)]
    assert abs(np.mean([one.value for one in found])) < 0.03  # type: ignore[misc]
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.9  # type: ignore[operator]
    naive = [max(np.subtract(*_rates(rng.random(30), rng.random(30)))) for _ in range(50)]
    assert np.mean(naive) > 0.1  # what choosing and trying on the same patients would say
    assert statistics.advantage(rng.random(30) + 1, rng.random(30), 0).low > 0.7  # type: ignore[operator]
    assert statistics.advantage(np.ones(3), np.ones(30), 0) == Interval()


def _rates(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.concatenate([inside, outside])
    return (inside >= values[:, None]).mean(1), (outside >= values[:, None]).mean(1)


@settings(max_examples=30)
@given(st.floats(0.01, 5), st.floats(0, 0.05))
def test_randomised_response_meets_the_bounds_exactly_and_nothing_else_does(epsilon: float, delta: float) -> None:
    """With chance delta the answer is given away, else it is right with chance e^eps / (1 + e^eps)."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    true, false = delta + (1 - delta) * right, (1 - delta) * (1 - right)
    assert statistics.tpr_bound(epsilon, delta, 1, false) == pytest.approx(true)
    assert statistics.advantage_bound(epsilon, delta, 1) == pytest.approx(true - false)
    corners = np.array([[0, delta], [false, true], [1 - delta, 1], [1, 1]])
    exact = np.trapezoid(corners[:, 1], corners[:, 0])
    assert exact <= statistics.auc_bound(epsilon, delta, 1) <= exact + 3e-3


def test_no_epsilon_bounds_nothing() -> None:
    assert statistics.tpr_bound(1e4, 0.0, 1, 1e-9) == 1.0
    assert statistics.tpr_bound(0.0, 0.0, 2, 0.25) == pytest.approx(0.25)
    assert statistics.advantage_bound(0.0, 0.0, 2) == 0.0
    assert statistics.advantage_bound(1e4, 0.0, 1) == statistics.auc_bound(1e4, 0.0, 2) == 1.0
    # G26: what epsilon 1 and 2 allow at a false-positive rate of 0.1 %: of coins, and of one in place of another.
    for steps, found in ((1, (0.00272, 0.00739)), (2, (0.00739, 0.0546))):
        for epsilon, most in zip((1.0, 2.0), found, strict=True):
            assert statistics.tpr_bound(epsilon, 0.0, steps, 0.001) == pytest.approx(most, abs=1e-5)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_one_in_place_of_another_under_laplace_noise_meets_the_bounds_of_two_steps_and_breaks_those_of_one(
    epsilon: float,
) -> None:
    """A sum that one person moves by 1 moves by 2 when someone else takes that place."""
    thresholds = np.linspace(-20, 20, 40001) / epsilon
    false, true = (laplace.sf(thresholds, at, 1 / epsilon) for at in (-1, 1))
    most = np.array([statistics.tpr_bound(epsilon, 0.0, 2, rate) for rate in false[::100]])
    assert (true[::100] <= most + 1e-12).all()
    rare = int(np.searchsorted(thresholds, 1.0))
    assert true[rare] == pytest.approx(statistics.tpr_bound(epsilon, 0.0, 2, false[rare]))
    assert (true - false).max() == pytest.approx(statistics.advantage_bound(epsilon, 0.0, 2), rel=1e-4)
    area = -float(np.trapezoid(true, false))
    assert area <= statistics.auc_bound(epsilon, 0.0, 2)
    assert area > statistics.auc_bound(epsilon, 0.0, 1)
    assert (true - false).max() > statistics.advantage_bound(epsilon, 0.0, 1)


@settings(max_examples=30)
@given(st.floats(0.01, 5), st.floats(0, 0.05))
def test_two_steps_gain_most_where_it_is_said(epsilon: float, delta: float) -> None:
    rates = np.linspace(0, 1, 101)
    gains = [statistics.tpr_bound(epsilon, delta, 2, rate) - rate for rate in rates]
    best = statistics.advantage_bound(epsilon, delta, 2)
    assert best == pytest.approx(1 - math.exp(-epsilon) * (1 - 2 * delta))
    assert max(gains) <= best + 1e-9


@pytest.mark.parametrize(
    ("strength", "control", "bound", "finding"),
    [
        ((0.6, 0.55, 0.65), (0.5, 0.45, 0.54), None, "found"),
        ((0.6, 0.55, 0.65), (0.5, 0.45, 0.56), None, "unclear"),
        ((0.6, 0.49, 0.7), (0.5, 0.45, 0.48), None, "not found"),
        ((None, None, None), (0.5, 0.45, 0.55), 0.5, "cannot be said"),
        ((0.9, 0.85, 0.95), (0.5, 0.45, 0.55), 0.8, "above bound"),
        ((0.6, 0.55, None), (None, None, None), 0.8, "found"),
    ],
)
def test_a_finding_follows_from_the_intervals(
    strength: tuple[float, ...], control: tuple[float, ...], bound: float | None, finding: str
) -> None:
    row = Row(
        subject="all",
        model="general",
        measure="AUC",
        strength=Interval(*strength),
        control=Interval(*control),
        chance=0.5,
        bound=bound,
    )
    assert row.finding == finding

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from confrere.errors import DataError
from confrere.metrics import calibration_note, ece, fit_temperature, reliability


def calibrated(seed, n=4000, classes=4):
    """Return logits whose softmax is the distribution that the labels were drawn from."""
    g = np.random.default_rng(seed)
    logits = 2 * g.normal(size=(n, classes))
    return logits, (softmax(logits, axis=1).cumsum(1) < g.random((n, 1))).sum(1)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(factor):
    logits, labels = calibrated(0)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.07)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_temperature_beats_a_grid_and_ignores_shifts(seed, shift):
    logits, labels = calibrated(seed, n=60)
    best = fit_temperature(logits, labels)

    def loss(t):
        return -log_softmax(logits / t, axis=1)[np.arange(60), labels].mean()

    assert loss(best) <= min(loss(t) for t in np.geomspace(0.1, 10, 200)) + 1e-6
    assert fit_temperature(logits + shift, labels) == pytest.approx(best, rel=1e-3)


def test_weights_count_as_copies():
    logits, labels = calibrated(1, n=50)
    copies = np.random.default_rng(0).integers(0, 4, size=50)
    by_weight = fit_temperature(logits, labels, weights=copies.astype(float))
    by_copy = fit_temperature(logits.repeat(copies, 0), labels.repeat(copies))
    assert by_weight == pytest.approx(by_copy, rel=1e-3)


@pytest.mark.parametrize(
    ("logits", "labels", "why"),
    [
        (np.zeros((19, 3)), np.arange(19) % 3, "Fewer than 20"),
        (np.zeros((0, 3)), np.zeros(0, int), "Fewer than 20"),
        (np.random.default_rng(0).normal(size=(30, 3)), np.zeros(30, int), "one class only"),
        (np.eye(3)[np.arange(30) % 3], np.arange(30) % 3, "classified correctly"),
    ],
)
def test_temperature_stays_one_where_it_cannot_be_known(logits, labels, why):
    assert fit_temperature(logits, labels) == 1.0
    assert why in calibration_note(logits, labels)


def test_images_of_weight_zero_do_not_count():
    logits, labels = calibrated(2, n=30)
    assert calibration_note(logits, labels) == ""
    assert "Fewer than" in calibration_note(logits, labels, weights=np.r_[np.ones(10), np.zeros(20)])


@pytest.mark.parametrize(
    ("logits", "labels", "weights", "message"),
    [
        (np.zeros((30, 3)), np.zeros(29, int), None, "do not fit"),
        (np.zeros((30, 3)), np.full(30, 3), None, "labels run"),
        (np.full((30, 3), np.nan), np.zeros(30, int), None, "not finite"),
        (np.zeros((30, 3)), np.zeros(30, int), -np.ones(30), "negative"),
    ],
)
def test_wrong_input_is_refused(logits, labels, weights, message):
    with pytest.raises(DataError, match=message):
        fit_temperature(logits, labels, weights=weights)


def test_reliability_by_hand():
    p = np.array([[0.5, 0.5], [0.55, 0.45], [0.05, 0.95], [1.0, 0.0]])
    bins = reliability(p, np.array([0, 1, 1, 0]), bins=2)
    assert bins[0] == {"low": 0.0, "high": 0.5, "n": 0, "confidence": None, "accuracy": None}
    assert bins[1] == {"low": 0.5, "high": 1.0, "n": 4, "confidence": 0.75, "accuracy": 0.75}
    assert ece(p, np.array([0, 1, 1, 0]), bins=2) == 0.0
    assert ece(p, np.array([0, 1, 1, 0]), bins=10) == pytest.approx((0.05 + 0.05) / 4)
    assert ece(np.zeros((0, 2)), np.zeros(0, int)) is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), bins=st.integers(1, 20))
def test_bins_partition_the_images_and_ece_matches_a_slow_loop(seed, bins):
    g = np.random.default_rng(seed)
    p, labels = g.dirichlet(np.ones(3), size=40), g.integers(3, size=40)
    records = reliability(p, labels, bins)
    assert sum(r["n"] for r in records) == 40
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(40) if b <= p[i].max() * bins < b + 1 or (b == bins - 1 and p[i].max() >= 1)]
        if inside:
            accuracy = np.mean([p[i].argmax() == labels[i] for i in inside])
            total += len(inside) / 40 * abs(accuracy - np.mean([p[i].max() for i in inside]))
    assert ece(p, labels, bins) == pytest.approx(total)


def test_fitting_lowers_the_error_of_overconfident_scores():
    logits, labels = calibrated(3, n=2000)
    hot = 4 * logits
    before = ece(softmax(hot, axis=1), labels)
    assert ece(softmax(hot / fit_temperature(hot, labels), axis=1), labels) < before / 3

"""The mean gain over hospitals: against the single-hospital test, by hand, and its false alarms."""

from __future__ import annotations

import numpy as np
import pytest

from confrere.metrics.mean_gain import mean_gain, mean_score, resample_site
from confrere.metrics.paired import Run, paired_gain


def run(right: np.ndarray, patients: int, images: int = 2) -> Run:
    """Return predictions for two classes in turn, right where ``right`` says."""
    labels = np.arange(patients * images) % 2
    said = np.where(right, labels, 1 - labels)
    return np.eye(2)[said] * 0.8 + 0.1, labels, np.repeat(np.arange(patients), images)


def drawn(rng: np.random.Generator, share: float, patients: int = 40) -> Run:
    return run(rng.random(2 * patients) < share, patients)


def test_the_gain_is_the_mean_of_the_hospitals_however_large() -> None:
    sites = []
    for patients, right in ((10, 0.5), (50, 1.0)):
        a, b = np.ones(2 * patients, bool), np.arange(2 * patients) >= 2 * patients * right
        rng = np.random.default_rng(0)
        sites.append(resample_site({"a": [run(a, patients)], "b": [run(b, patients)]}, generator=rng, resamples=200))
    found = mean_gain([s for s in sites if s], "a", "b")
    assert found["gain"] == pytest.approx((0.5 + 1.0) / 2)
    assert (found["sites"], found["patients"], found["seeds"]) == (2, 60, 1)
    back = mean_gain([s for s in sites if s], "b", "a")
    assert back["gain"] == pytest.approx(-found["gain"])
    assert back["p"] == found["p"]


def test_one_hospital_is_nearly_the_paired_test() -> None:
    rng = np.random.default_rng(1)
    a, b = ([drawn(rng, share) for _ in range(3)] for share in (0.85, 0.7))
    site = resample_site({"a": a, "b": b}, generator=np.random.default_rng(2), resamples=4000)
    assert site is not None
    ours = mean_gain([site], "a", "b")
    theirs = paired_gain(a, b, generator=np.random.default_rng(3), resamples=4000)
    assert ours["gain"] == pytest.approx(theirs["gain"])
    for end in ("low", "high"):
        assert ours[end] == pytest.approx(theirs[end], abs=0.02)
        assert abs(ours[end] - ours["gain"]) >= 0.97 * abs(theirs[end] - theirs["gain"]), "no narrower"


def test_hospitals_add_up_to_what_none_shows_alone() -> None:
    rng = np.random.default_rng(5)
    sites = []
    for _ in range(8):
        runs = {"a": [drawn(rng, 0.80, 24)], "b": [drawn(rng, 0.66, 24)]}
        sites.append(resample_site(runs, generator=rng, resamples=2000))
    known = [s for s in sites if s]
    together = mean_gain(known, "a", "b")
    alone = [mean_gain([site], "a", "b") for site in known]
    assert together["p"] < 0.01 < min(1.0, min(one["p"] for one in alone) * 8)
    assert together["high"] - together["low"] < min(one["high"] - one["low"] for one in alone)


def test_few_patients_take_no_part_and_equal_models_do_not_differ() -> None:
    rng = np.random.default_rng(0)
    five = {"a": [drawn(rng, 0.5, 5)]}
    assert resample_site(five, generator=rng, resamples=10) is None
    assert mean_gain([], "a", "b")["note"] == "no hospital has 6 test patients"
    assert mean_score([], "a")["mean"] is None
    same = drawn(rng, 0.6)
    site = resample_site({"a": [same], "b": [same]}, generator=rng, resamples=100)
    assert site is not None
    found = mean_gain([site], "a", "b")
    assert (found["gain"], found["low"], found["high"], found["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_equal_methods_are_told_apart_in_one_of_twenty_at_most() -> None:
    alarms = 0
    for trial in range(200):
        rng = np.random.default_rng([9, trial])
        sites = []
        for _ in range(3):
            runs = {name: [drawn(rng, 0.7, 20) for _ in range(3)] for name in "ab"}
            sites.append(resample_site(runs, generator=rng, resamples=300))
        found = mean_gain([s for s in sites if s], "a", "b")
        alarms += found["p"] < 0.05
        assert (found["p"] < 0.05) == (not found["low"] <= 0 <= found["high"])
    assert alarms <= 16  # binomial(200, 0.05) exceeds this once in 40


def test_the_mean_score_has_an_interval_over_patients() -> None:
    rng = np.random.default_rng(0)
    site = resample_site({"a": [drawn(rng, 0.7, 200)]}, generator=rng, resamples=1000)
    assert site is not None
    found = mean_score([site], "a")
    mean, low, high = (found[key] or 0.0 for key in ("mean", "low", "high"))
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * (mean * (1 - mean) / 400) ** 0.5, rel=0.2)

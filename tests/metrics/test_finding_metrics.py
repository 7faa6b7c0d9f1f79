"""Metrics of findings against scikit-learn, and their paired comparison against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from confrere.errors import DataError
from confrere.metrics.bootstrap import draw
from confrere.metrics.findings import MEASURES, evaluate_findings, of_findings, values_of_patients
from confrere.metrics.mean_gain import mean_gain, resample_site
from confrere.metrics.paired import Run, paired_gain
from confrere.seeds import numpy_generator

PEERS = {
    "auroc": roc_auc_score,
    "average_precision": average_precision_score,
    "f1": lambda t, p: f1_score(t, p >= 0.5),
    "brier": brier_score_loss,
}


def some(seed: int, images: int = 14, findings: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = numpy_generator(seed, "findings")
    chances = rng.integers(0, 11, (images, findings)) / 10  # ties
    truth = rng.choice([-1, 0, 1], (images, findings), p=[0.2, 0.4, 0.4])
    return chances, truth, np.arange(images) // 2


def slow(name: str, chances: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> float:
    """Return the mean over findings as scikit-learn has it, of the rows given (as often as they are)."""
    values = []
    for k in range(truth.shape[1]):
        known = rows[truth[rows, k] >= 0]
        there = truth[known, k] == 1
        if name == "brier" and not len(known):
            continue
        if (name == "auroc" and len(set(there)) < 2) or (name in ("average_precision", "f1") and not there.any()):
            continue
        one: np.ndarray = chances[known, k]
        values.append(np.mean((one - there) ** 2) if name == "brier" else PEERS[name](there, one))
    return float(np.mean(values)) if values else np.nan


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_measures_and_their_resamples_are_those_of_scikit_learn(seed: int) -> None:
    chances, truth, groups = some(seed)
    weights = draw(7, numpy_generator(seed, "draw"), 3)
    for name, measure in MEASURES.items():
        found = of_findings(measure, chances, truth, groups, weights)
        for row, one in zip(weights, found, strict=True):
            rows = np.repeat(np.arange(14), row[groups].astype(int))
            mean = np.mean(one[~np.isnan(one)]) if (~np.isnan(one)).any() else np.nan
            assert mean == pytest.approx(slow(name, chances, truth, rows), nan_ok=True), name


def test_what_is_said_of_a_site() -> None:
    chances, truth, groups = some(1, images=40)
    truth[:, 1] = np.maximum(truth[:, 1], 0) * 0
    found = evaluate_findings(
        chances, truth, groups, classes=("a", "b", "c"), generator=numpy_generator(0, "x"), resamples=200
    )
    for name in MEASURES:
        assert found[name]["value"] == pytest.approx(slow(name, chances, truth, np.arange(40)))
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert (found["n"], found["patients"], found["absent"]) == (40, 20, ["b"])
    assert found["by_class"]["b"] == {"value": None, "low": None, "high": None}
    assert found["prevalence"]["b"] == 0.0
    assert len(found["notes"]) == 2
    few = evaluate_findings(chances[:4], truth[:4], groups[:4], classes="abc", generator=numpy_generator(0, "x"))
    assert few["auroc"]["low"] is None
    assert "Fewer than 6 test patients: no intervals." in few["notes"]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_gains_are_differences_of_mean_auroc(seed: int) -> None:
    a, truth, groups = some(seed, 30)
    b, _, _ = some(seed + 1, 30)
    one: Run = (a, truth, groups)
    two: Run = (b, truth, groups)
    found = paired_gain([one], [two], generator=numpy_generator(0, "x"), resamples=50, metric="auroc")
    rows = np.arange(30)
    assert found["gain"] == pytest.approx(slow("auroc", a, truth, rows) - slow("auroc", b, truth, rows))
    assert found["low"] <= found["gain"] <= found["high"]
    same = paired_gain([one], [one], generator=numpy_generator(0, "x"), resamples=50)
    assert (same["gain"], same["p"]) == (0.0, 1.0)
    site = resample_site({"a": [one], "b": [two]}, generator=numpy_generator(0, "x"), resamples=50)
    assert site is not None
    assert mean_gain([site], "a", "b")["gain"] == pytest.approx(found["gain"])


def test_patients_are_counted_by_finding() -> None:
    truth = np.array([[1, 0], [0, 0], [-1, 0]])
    assert values_of_patients(truth, np.array([0, 0, 1]), 2).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("chances", "truth"), [(np.full((2, 2), 1.5), np.ones((2, 2))), (np.zeros((2, 2)), np.full((2, 2), 2))]
)
def test_what_is_out_of_range_is_refused(chances: np.ndarray, truth: np.ndarray) -> None:
    with pytest.raises(DataError) as caught:
        evaluate_findings(chances, truth, np.arange(2), classes="ab", generator=numpy_generator(0, "x"))
    assert caught.value.code == "metric-input"

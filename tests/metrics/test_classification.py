"""Parity with scikit-learn, properties, hand examples and coverage."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from confrere.errors import DataError
from confrere.metrics import evaluate, score
from confrere.metrics.bootstrap import draw, effective_patients, exact, percentile, tail, widened_p
from confrere.metrics.classification import _samples

METRICS = ("balanced_accuracy", "auroc", "f1", "accuracy", "ece")


def sample(seed, *, patients=30, classes=4, per_patient=3, ties=False, skill=1.0):
    """Return probabilities, labels and groups with an effect of the patient."""
    g = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), g.integers(1, per_patient + 1, size=patients))
    labels = g.integers(classes, size=patients)[groups]
    logits = g.normal(size=(len(groups), classes))
    logits[np.arange(len(groups)), labels] += skill + 0.5 * g.normal(size=patients)[groups]
    if ties:
        logits = np.round(logits)
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True), labels, groups


def run(p, y, groups, **options):
    names = [f"c{k}" for k in range(p.shape[1])]
    return evaluate(p, y, groups, classes=names, generator=np.random.default_rng(0), resamples=200, **options)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_resample_agrees_with_sklearn_under_sample_weights(seed, ties):
    p, y, groups = sample(seed, ties=ties, patients=12 + seed)
    weights = draw(groups.max() + 1, np.random.default_rng(seed), 4)
    ours, _ = _samples(p, y, groups, weights)
    guess, K = p.argmax(1), p.shape[1]
    for r, w in enumerate(weights):
        w = w[groups]
        present = [k for k in range(K) if w[y == k].sum() > 0]
        recall = reference.recall_score(y, guess, labels=present, average=None, sample_weight=w, zero_division=0)
        np.testing.assert_allclose(ours["recall"][r, present], recall, atol=1e-12)
        assert np.isnan(np.delete(ours["recall"][r], present)).all()
        assert ours["balanced_accuracy"][r] == pytest.approx(recall.mean())
        f1 = reference.f1_score(y, guess, labels=present, average="macro", sample_weight=w, zero_division=0)
        assert ours["f1"][r] == pytest.approx(f1)
        assert ours["accuracy"][r] == pytest.approx(reference.accuracy_score(y, guess, sample_weight=w))
        # A vanished class has no positives, so it is in no one-versus-rest average.
        areas = [reference.roc_auc_score(y == k, p[:, k], sample_weight=w) for k in present]
        assert ours["auroc"][r] == pytest.approx(np.mean(areas))


def test_the_sample_agrees_with_sklearn():
    p, y, groups = sample(1, patients=60)
    out = run(p, y, groups)
    guess = p.argmax(1)
    assert out["balanced_accuracy"]["value"] == pytest.approx(reference.balanced_accuracy_score(y, guess))
    assert out["auroc"]["value"] == pytest.approx(reference.roc_auc_score(y, p, multi_class="ovr"))
    assert out["f1"]["value"] == pytest.approx(reference.f1_score(y, guess, average="macro"))
    assert out["confusion"] == reference.confusion_matrix(y, guess).tolist()
    assert score(p, y) == pytest.approx(out["balanced_accuracy"]["value"])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    patients=st.integers(0, 25),
    classes=st.integers(2, 5),
    ties=st.booleans(),
    skill=st.sampled_from([-20.0, 0.0, 2.0, 20.0]),
)
def test_output_is_strict_json_with_values_inside_their_intervals(seed, patients, classes, ties, skill):
    p, y, groups = sample(seed, patients=patients, classes=classes, ties=ties, skill=skill)
    out = run(p, y, groups)
    json.dumps(out, allow_nan=False)
    assert np.sum(out["confusion"]) == out["n"] == len(y)
    assert all(isinstance(cell, int) for row in out["confusion"] for cell in row)
    for estimate in [out[m] for m in METRICS] + [r for r in out["recall"].values() if r]:
        if estimate["low"] is not None:
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
            assert estimate["low"] < estimate["high"]
        else:
            assert estimate["high"] is None


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_of_images_and_names_of_patients_do_not_matter(seed):
    p, y, groups = sample(seed, patients=15)
    order = np.random.default_rng(seed).permutation(len(y))
    shuffled = run(p[order], y[order], 7 * groups[order] + 3)
    for name, value in run(p, y, groups).items():
        if name in METRICS:
            for key, number in value.items():
                assert shuffled[name][key] == (None if number is None else pytest.approx(number))
        elif name != "recall":
            assert shuffled[name] == value


def test_hand_example():
    p = np.array([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.2, 0.8, 0.0], [0.7, 0.3, 0.0]])
    out = run(p, np.array([0, 0, 1, 1]), np.arange(4))
    assert out["recall"]["c0"]["value"] == out["accuracy"]["value"] == 0.5
    assert out["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert out["absent"] == ["c2"]
    assert out["recall"]["c2"] is None
    assert out["auroc"]["value"] == 0.75  # of four pairs only 0.4 against 0.7 is the wrong way round
    assert out["f1"]["value"] == 0.5
    assert out["ece"]["value"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.7) / 4)
    assert "c2" in out["notes"][0]


def test_no_images_at_all():
    out = run(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int))
    assert [out[m] for m in METRICS] == [{"value": None, "low": None, "high": None}] * 5
    assert out["recall"] == {"c0": None, "c1": None, "c2": None}
    assert out["absent"] == ["c0", "c1", "c2"]
    assert out["notes"] == ["There are no test images, so nothing can be measured."]


def test_one_class_has_no_auroc():
    p, _, groups = sample(0)
    out = run(p, np.zeros(len(p), int), groups)
    assert out["auroc"] == {"value": None, "low": None, "high": None}
    assert any("AUROC is undefined" in note for note in out["notes"])


def test_vanishing_classes_are_said():
    p, y, groups = sample(3, patients=20, classes=2)
    y[:] = 0
    y[groups == 0] = 1  # the only patient of class 1: vanishes from (19/20)^20 = 36 % of the resamples
    out = run(p, y, groups)
    assert any("of the resamples a class has no patient" in note for note in out["notes"])
    width = out["balanced_accuracy"]["high"] - out["balanced_accuracy"]["low"]
    accuracy = out["accuracy"]["high"] - out["accuracy"]["low"]
    assert width > accuracy  # one patient decides half of it


def test_perfect_predictions_are_not_certain():
    y = np.repeat([0, 1], 10)
    out = run(np.eye(2)[y], y, np.arange(20))
    assert out["recall"]["c0"]["low"] == pytest.approx(0.025 ** (1 / 10))
    assert out["accuracy"]["low"] == pytest.approx(0.025 ** (1 / 20))
    assert out["balanced_accuracy"] == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 10)), "high": 1.0}
    assert out["auroc"] == {"value": 1.0, "low": None, "high": None}
    assert "All resamples agree on auroc, f1, ece, so no interval can be given." in out["notes"]


def test_tiny_sites_get_exact_intervals_or_none():
    y = np.array([0, 0, 1, 1, 1])
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9], [0.4, 0.6]])
    out = run(p, y, np.arange(5))
    assert out["balanced_accuracy"] == {"value": 0.75, "low": None, "high": None}
    assert out["recall"]["c0"]["low"] == pytest.approx(0.0126, abs=1e-4)  # Clopper-Pearson of 1 in 2
    assert out["recall"]["c0"]["high"] == pytest.approx(0.9874, abs=1e-4)
    assert "Fewer than 6 test patients" in out["notes"][0]


def test_many_images_of_one_patient_are_one_piece_of_evidence():
    one = exact(1.0, np.array([50.0]))
    assert one["low"] == pytest.approx(0.025)
    assert exact(1.0, np.array([50.0, 1.0]))["low"] < exact(1.0, np.array([25.0, 25.0]))["low"]
    p, y, groups = sample(5, patients=40, per_patient=1)
    once, copies = run(p, y, groups), run(p.repeat(9, 0), y.repeat(9), groups.repeat(9))
    for end in ("value", "low", "high"):
        assert copies["balanced_accuracy"][end] == pytest.approx(once["balanced_accuracy"][end])


def test_cuts_match_hesterbergs_table_and_p_inverts_them():
    assert tail(20) == pytest.approx(0.0159, abs=2e-4)
    assert tail(1_000_000) == pytest.approx(0.025, abs=1e-5)
    for patients in (3.5, 10, 200):
        assert widened_p(2 * tail(patients), patients) == pytest.approx(0.05)


def test_effective_patients():
    def one_patient_per_image(*counts):
        return np.eye(len(counts))[np.repeat(np.arange(len(counts)), counts)]

    assert effective_patients(one_patient_per_image(10)) == pytest.approx(10)
    assert effective_patients(one_patient_per_image(10, 10)) == pytest.approx(19)
    assert effective_patients(one_patient_per_image(100, 2)) < 2.2
    assert effective_patients(np.zeros((0, 3))) == 0


def test_bias_is_taken_off():
    samples = np.linspace(0.1, 0.3, 1001)  # resampling adds 0.1, so the sample has 0.1 too much as well
    found = percentile(0.1, samples, 1000, biased=True)
    assert (found["value"], found["low"]) == (0.1, 0.0)
    assert found["high"] == pytest.approx(0.195, abs=1e-3)


def test_averages_over_classes_are_cut_further_out():
    p, y, groups = sample(2, patients=60, classes=2, skill=0.3)
    samples, confusion = _samples(p, y, groups, draw(60, np.random.default_rng(0), 200))
    effective = effective_patients(confusion.sum(2))
    value, resampled = samples["balanced_accuracy"][0], samples["balanced_accuracy"][1:]
    assert run(p, y, groups)["balanced_accuracy"] == percentile(value, resampled, 60, effective=effective)


def test_interval_needs_a_majority_of_defined_resamples():
    samples = np.r_[np.full(60, np.nan), np.linspace(0, 1, 40)]
    assert percentile(0.5, samples, 50)["low"] is None
    assert percentile(0.5, samples[30:], 50)["low"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, y, g: (p[:-1], y, g), "do not fit"),
        (lambda p, y, g: (p[:, :2], y, g), "do not fit"),
        (lambda p, y, g: (p, y + 3, g), "labels run from"),
        (lambda p, y, g: (2 * p, y, g), "not probabilities"),
        (lambda p, y, g: (p * np.nan, y, g), "not probabilities"),
    ],
)
def test_wrong_input_is_refused(change, message):
    p, y, g = change(*sample(0))
    with pytest.raises(DataError, match=message):
        evaluate(p, y, g, classes=list("abcd"), generator=np.random.default_rng(0))


def test_score_refuses_nothing_to_score():
    with pytest.raises(DataError, match="cannot score"):
        score(np.zeros((0, 2)), np.zeros(0, int))


def test_same_generator_same_result():
    assert run(*sample(0)) == run(*sample(0))


def test_fast_enough():
    p, y, groups = sample(0, patients=400, classes=7)
    begin = time.process_time()
    evaluate(p, y, groups, classes=list("abcdefg"), generator=np.random.default_rng(0))
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize(("patients", "least"), [(12, 0.87), (60, 0.89)])
def test_coverage_of_the_intervals(patients, least):
    # 150 draws: the nominal 0.95 falls below 0.89 with probability 0.001.
    big_p, big_y, big_groups = sample(99, patients=20_000, classes=2)
    truth, _ = _samples(big_p, big_y, np.zeros_like(big_groups), np.ones((1, 1)))
    covered = {name: [] for name in METRICS}
    for seed in range(150):
        out = run(*sample(seed, patients=patients, classes=2))
        for name in METRICS:
            if out[name]["low"] is not None:
                covered[name].append(out[name]["low"] <= truth[name][0] <= out[name]["high"])
    assert {n: np.mean(c) for n, c in covered.items() if np.mean(c) < (least if n != "ece" else 0.8)} == {}

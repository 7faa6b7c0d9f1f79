from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.errors import DataError
from confrere.metrics import holm, paired_gain, score, verdict


def one_run(seed, *, patients=30, classes=3, skill=(1.0, 1.0), first=0):
    """Return the runs of two models on the same images; they share the effect of the patient."""
    g = np.random.default_rng(seed)
    groups = first + np.repeat(np.arange(patients), g.integers(1, 4, size=patients))
    labels = g.integers(classes, size=patients)[groups - first]
    effect = g.normal(size=patients)[groups - first]
    runs = []
    for s in skill:
        logits = g.normal(size=(len(groups), classes))
        logits[np.arange(len(groups)), labels] += s + effect
        p = np.exp(logits)
        runs.append((p / p.sum(1, keepdims=True), labels, groups))
    return tuple(runs)


def gain(pairs, resamples=400):
    a, b = zip(*pairs, strict=True)
    return paired_gain(a, b, generator=np.random.default_rng(0), resamples=resamples)


def right(hits, labels):
    """Return two-class probabilities that are right where ``hits`` says so."""
    guess = np.where(np.asarray(hits, bool), labels, 1 - np.asarray(labels))
    return np.eye(2)[guess]


def test_gain_is_the_mean_difference_of_scores():
    pairs = [one_run(s, patients=20 + s, first=5 * s) for s in range(3)]
    expected = np.mean([score(*a[:2]) - score(*b[:2]) for a, b in pairs])
    out = gain(pairs)
    assert out["gain"] == pytest.approx(expected)
    assert out["low"] <= out["gain"] <= out["high"]
    assert (out["seeds"], out["patients"]) == (3, 32)
    json.dumps(out, allow_nan=False)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), patients=st.integers(0, 30))
def test_swapping_the_models_flips_the_sign(seed, patients):
    a, b = one_run(seed, patients=patients)
    there, back = gain([(a, b)]), gain([(b, a)])
    if there["gain"] is None:
        assert back["gain"] is None
        return
    assert there["gain"] == pytest.approx(-back["gain"])
    assert there["p"] == (None if back["p"] is None else pytest.approx(back["p"]))
    if there["low"] is not None:
        assert there["low"] == pytest.approx(-back["high"])
        assert there["p"] < 0.05 or there["low"] <= 0 <= there["high"]


def test_a_clear_gain_is_found():
    out = gain([one_run(0, patients=80, skill=(4.0, -1.0))])
    assert out["low"] > 0
    assert out["p"] < 0.02


def test_same_patients_in_several_seeds_are_no_new_evidence():
    a, b = one_run(4, patients=25, skill=(1.6, 0.8))
    once, thrice = gain([(a, b)], 2000), gain([(a, b)] * 3, 2000)
    assert thrice["patients"] == once["patients"]
    width = [out["high"] - out["low"] for out in (once, thrice)]
    assert width[1] == pytest.approx(width[0], rel=0.1)


def test_disagreeing_seeds_widen_the_interval():
    better, worse = one_run(1, patients=60, skill=(3.0, 0.0))
    agree, disagree = gain([(better, worse)] * 2), gain([(better, worse), (worse, better)])
    assert disagree["high"] - disagree["low"] > 2 * (agree["high"] - agree["low"])


def seeds_of(generator, patients, labels, skill, n_seeds, bias):
    """Return one model's runs: the patients' own difficulty, and a bias for classes drawn anew for each seed."""
    runs = []
    for _ in range(n_seeds):
        logits = patients + bias * generator.normal(size=patients.shape[1])
        logits = logits + 0.3 * generator.normal(size=patients.shape) + skill * np.eye(patients.shape[1])[labels]
        runs.append((np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels, np.arange(len(labels))))
    return runs


@pytest.mark.parametrize("bias", [0.0, 0.6])
def test_methods_that_differ_by_chance_of_training_are_rarely_called_different(bias):
    called = 0
    for trial in range(40):
        g = np.random.default_rng(trial)
        labels = g.integers(4, size=120)
        patients = g.normal(size=(120, 4))
        a, b = (seeds_of(g, patients, labels, 1.0, 3, bias) for _ in range(2))
        out = gain(zip(a, b, strict=True))
        assert (out["p"] < 0.05) == (not out["low"] <= 0 <= out["high"])
        called += out["p"] < 0.05
    assert called <= 4


def test_a_clear_gain_is_found_with_three_seeds():
    g = np.random.default_rng(0)
    labels, patients = g.integers(4, size=200), g.normal(size=(200, 4))
    a, b = (seeds_of(g, patients, labels, skill, 3, 0.2) for skill in (2.5, 0.8))
    out = gain(zip(a, b, strict=True))
    assert out["low"] > 0
    assert out["p"] < 0.02


def test_identical_models():
    a, _ = one_run(0)
    out = gain([(a, a)])
    assert (out["gain"], out["low"], out["high"], out["p"]) == (0.0, 0.0, 0.0, 1.0)
    assert "same test images" in out["note"]


@pytest.mark.parametrize("differing", [1, 3, 5])
def test_a_handful_of_differing_patients_prove_nothing(differing):
    labels = np.arange(100) % 2
    a = (right(np.ones(100), labels), labels, np.arange(100))
    b = (right(np.arange(100) >= differing, labels), labels, np.arange(100))
    out = gain([(a, b)])
    assert out["p"] >= 2.0 ** (1 - differing)
    assert out["low"] <= 0 < out["gain"]
    assert out["note"].startswith(f"the models differ on {differing} test patient")


def test_differing_patients_are_counted_over_all_seeds():
    labels, groups = np.arange(100) % 2, np.arange(100)
    a = (right(np.ones(100), labels), labels, groups)
    half = [(right((groups < s) | (groups >= s + 4), labels), labels, groups) for s in (0, 4)]
    assert gain([(a, b) for b in half])["note"] is None
    assert "on 4 test patients" in gain([(a, half[0])])["note"]


def test_a_rare_class_widens_the_interval():
    labels = np.r_[np.zeros(57, int), np.ones(3, int)]
    hits = np.arange(60) % 3 > 0
    a, b = right(hits, labels), right(~hits, labels)
    rare = gain([((a, labels, np.arange(60)), (b, labels, np.arange(60)))])
    assert rare["p"] > 0.05
    assert rare["low"] <= 0 < rare["gain"]


@pytest.mark.parametrize(("patients", "word"), [(0, "no test images"), (5, "fewer than 6")])
def test_too_few_patients(patients, word):
    out = gain([one_run(0, patients=patients)])
    assert (out["low"], out["high"], out["p"]) == (None, None, None)
    assert word in out["note"]
    assert "cannot" in verdict("ghent", out, "local")


def test_no_seeds():
    out = paired_gain([], [], generator=np.random.default_rng(0))
    assert out["gain"] is None


def test_different_test_images_are_refused():
    (a, b), (p, labels, groups) = one_run(0), one_run(0)[0]
    for other in [(p, 1 - labels % 2, groups), (p, labels, groups + 1), one_run(0, patients=5)[0]]:
        with pytest.raises(DataError, match="same images"):
            gain([(a, other)])
    with pytest.raises(DataError, match="1 runs against 2"):
        paired_gain([a], [a, b], generator=np.random.default_rng(0))
    with pytest.raises(DataError, match="number of classes"):
        gain([(a, b), one_run(0, classes=4)])


@pytest.mark.parametrize("weights", [(1, 1, 1), (6, 3, 1)])
def test_equal_models_are_rarely_called_different(weights):
    # The nominal rate is 0.05; 200 draws exceed 0.10 with probability 0.001.
    false = 0
    for seed in range(200):
        g = np.random.default_rng(seed)
        labels = g.choice(3, p=np.array(weights) / sum(weights), size=30)
        guesses = [np.where(g.random(30) < 0.6, labels, g.integers(3, size=30)) for _ in range(2)]
        a, b = (np.eye(3)[guess] for guess in guesses)
        out = gain([((a, labels, np.arange(30)), (b, labels, np.arange(30)))], 300)
        false += not out["low"] <= 0 <= out["high"]
    assert false / 200 <= 0.10


def slow_holm(ps):
    """Return by definition: over every subset that holds the hypothesis, size times its smallest p."""
    subsets = [s for n in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), n)]
    bounds = {s: min(1.0, len(s) * min(ps[i] for i in s)) for s in subsets}
    return [max(bounds[s] for s in subsets if i in s) for i in range(len(ps))]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(ps):
    assert holm(ps) == pytest.approx(slow_holm(ps))


def test_holm_leaves_undefined_ones_out():
    assert holm([0.03, None, 0.01]) == [0.03, None, 0.02]
    assert holm([]) == []


def estimate(value, low, high, *, patients=50, p=0.5, note=None, seeds=3):
    return {"gain": value, "low": low, "high": high, "p": p, "patients": patients, "seeds": seeds, "note": note}


@pytest.mark.parametrize(
    ("found", "other", "sentence"),
    [
        (
            estimate(0.062, 0.011, 0.11),
            "local",
            "At rosendahl, joining the federation raised the balanced accuracy by 6.2 points "
            "(95 % interval 1.1 to 11.0) over training alone: joining paid.",
        ),
        (
            estimate(-0.03, -0.05, -0.01),
            "local",
            "At rosendahl, joining the federation lowered the balanced accuracy by 3.0 points "
            "(95 % interval 1.0 to 5.0) compared with training alone: joining did not pay.",
        ),
        (
            estimate(-0.004, -0.05, 0.0),
            "pooled",
            "At rosendahl, there is no evidence that joining the federation helped or harmed compared with "
            "training on the pooled data of all hospitals (difference in balanced accuracy \N{MINUS SIGN}0.4 "
            "points, 95 % interval \N{MINUS SIGN}5.0 to 0.0).",
        ),
        (
            estimate(0.2, 0.1, 0.3, seeds=1),
            "local",
            "At rosendahl, joining the federation raised the balanced accuracy by 20.0 points (95 % interval "
            "10.0 to 30.0) over training alone: joining paid. One training run: chance between runs is not in the "
            "interval.",
        ),
        (
            estimate(0.2, 0.1, 0.3, patients=12),
            "plain averaging",
            "At rosendahl, joining the federation raised the balanced accuracy by 20.0 points (95 % interval "
            "10.0 to 30.0) over plain averaging. Only 12 test patients: read this with caution.",
        ),
        (
            estimate(0.5, None, None, patients=1),
            "local",
            "At rosendahl, 1 test patient cannot show whether joining the federation helped or harmed "
            "compared with training alone (difference in balanced accuracy +50.0 points).",
        ),
        (
            estimate(None, None, None, patients=0, note="there are no test images"),
            "local",
            "At rosendahl, joining the federation cannot be compared with training alone: there are no test images.",
        ),
    ],
)
def test_verdicts_in_words(found, other, sentence):
    assert verdict("rosendahl", found, other) == sentence

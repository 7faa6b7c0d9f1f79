"""Distances, membership by patient and intervals, against slow independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from confrere.adapters import head
from confrere.adapters.algebra import named, product
from confrere.forgetting.attack import Sureness
from confrere.forgetting.judge import Answer, distances, interval, judge, membership
from confrere.seeds import numpy_generator, torch_generator

SLOTS = ("general", "personal")


def model(seed: int, *, gauge: float = 1.0, far: float = 1.0) -> Answer:
    """Return an answer drawn at random; ``gauge`` rescales factors, which changes no product."""
    rng, drawn = numpy_generator(seed, "answer"), torch_generator(seed, "answer")
    weights = {}
    for slot in SLOTS:
        pair = (torch.randn(2, 5, generator=drawn) * gauge, far * torch.randn(4, 2, generator=drawn) / gauge)
        weights |= named({"blocks.0.attn": pair}, slot)
    weights |= {head.WEIGHT: far * torch.randn(3, 4, generator=drawn), head.BIAS: torch.zeros(3)}
    test, gone = rng.dirichlet(np.ones(3), 7), rng.dirichlet(np.ones(3), 5)
    auc = float(rng.random())
    return Answer(
        test=test,
        gone=gone,
        score=float(rng.random()),
        loss=1.0,
        accuracy=0.5,
        auc=auc,
        resampled=rng.random(200),
        patients=9,
        sure=Sureness(phi=rng.normal(0, 1, 8), patients=np.arange(8), inside=np.arange(8) < 4),
        weights={"a": weights},
    )


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), gauge=st.floats(0.1, 10))
def test_distances_are_those_of_full_matrices(seed: int, gauge: float) -> None:
    one, other = model(seed), model(seed + 1, gauge=gauge)
    found = distances(one, other, SLOTS)

    def full(answer: Answer) -> torch.Tensor:
        of = answer.weights["a"]
        pairs = [(of[f"blocks.0.attn.lora_A.{s}.weight"], of[f"blocks.0.attn.lora_B.{s}.weight"]) for s in SLOTS]
        return torch.cat([sum(product(pair).double() for pair in pairs).flatten(), of[head.WEIGHT].double().flatten()])  # type: ignore[union-attr]

    x, y = full(one), full(other)
    assert found["weights"] == pytest.approx(float((x - y).norm() / (x.norm() * y.norm()).sqrt()), rel=1e-4)
    far = [
        max(abs(float(sum((p - q)[list(part)]))) for part in ((0,), (1,), (2,)))
        for p, q in zip(one.test, other.test, strict=True)
    ]
    assert found["test"] == pytest.approx(np.mean(far))  # the largest difference over all events of three classes
    assert found == pytest.approx(distances(other, one, SLOTS))
    assert distances(one, model(seed, gauge=gauge), SLOTS)["weights"] == pytest.approx(0, abs=2e-3)
    assert distances(one, one, SLOTS)["test"] == 0


@settings(max_examples=25)
@given(data=st.data())
def test_membership_is_the_chance_to_tell_two_patients_apart(data: st.DataObject) -> None:
    count = st.integers(1, 8)
    loss = st.sampled_from([0.1, 0.5, 0.9, 1.3])
    ours, theirs = ([data.draw(st.lists(loss, min_size=1, max_size=3)) for _ in range(data.draw(count))] for _ in "ab")
    flat = [np.array([x for patient in side for x in patient]) for side in (ours, theirs)]
    groups = [np.array([7 * i for i, patient in enumerate(side) for _ in patient]) for side in (ours, theirs)]
    found, resampled, patients = membership(flat[0], groups[0], flat[1], groups[1], 0)
    left, right = [np.mean(p) for p in ours], [np.mean(p) for p in theirs]
    u = sum((a < b) + 0.5 * (np.float64(a) == np.float64(b)) for a in left for b in right)
    assert found == pytest.approx(u / (len(left) * len(right)), abs=1 / (len(left) * len(right)) if ours else 0)
    assert patients == min(len(ours), len(theirs))
    assert ((resampled >= 0) & (resampled <= 1)).all()


def test_members_that_are_known_by_heart_are_found() -> None:
    rng = numpy_generator(0, "losses")
    low, high = rng.uniform(0, 0.1, 40), rng.uniform(0.5, 1, 40)
    value, resampled, _ = membership(low, np.arange(40), high, np.arange(40), 0)
    assert value == 1.0
    assert resampled.min() == 1.0
    value, resampled, _ = membership(high, np.arange(40), high, np.arange(40), 0)
    assert value == 0.5
    assert np.quantile(resampled, [0.025, 0.975]) == pytest.approx([0.37, 0.63], abs=0.06)


def test_the_interval_is_students() -> None:
    values = [0.3, 0.5, 0.1, 0.4]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx({"mean": np.mean(values), "low": low, "high": high})
    assert interval([0.3])["low"] is None


def test_a_model_like_the_retrained_is_as_close_as_they_are() -> None:
    others = [model(seed) for seed in range(2, 7)]
    like, unlike = (
        judge(model(1), model(0, far=30.0), others, SLOTS),
        judge(model(0, far=30.0), model(1), others, SLOTS),
    )
    assert like["retrained"] == 5
    of = like["distances"]["weights"]
    assert of["retrained"]["low"] < of["after"]["mean"] < of["retrained"]["high"] + of["retrained"]["mean"]
    assert unlike["distances"]["weights"]["after"] == of["before"]
    assert of["before"]["mean"] > 2 * of["retrained"]["mean"]
    assert unlike["distances"]["weights"]["closer"] == 0
    assert like["attack"]["before"] == unlike["attack"]["after"] != like["attack"]["after"]
    assert like["membership"]["after"]["low"] < like["membership"]["after"]["high"]

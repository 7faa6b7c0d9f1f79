"""LiRA on the forgotten, with the retrained as references: by formula, on invented models, on what was learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tiny_federation import backbone_of, initial_params
from torch import Tensor

from confrere.forgetting.attack import Sureness, attacked, each_left_out, sureness
from confrere.forgetting.judge import Asked, answer, interval, judge
from confrere.learner import Learner, TrainSettings
from confrere.method import make
from confrere.seeds import numpy_generator
from confrere.tensors import Tensors
from confrere.tokenset import Batch, TokenSet

MEMBERS, OTHERS, RETRAINED = 120, 120, 5
INSIDE = np.arange(MEMBERS + OTHERS) < MEMBERS


def sure(phi: np.ndarray, patients: np.ndarray | None = None) -> Sureness:
    return Sureness(phi=phi, patients=np.arange(len(phi)) if patients is None else patients, inside=INSIDE[: len(phi)])


def models(leak: float, easier: float = 0.0, seed: int = 0) -> tuple[Sureness, list[Sureness]]:
    """Return a model that leaks, and retrained ones; images differ in difficulty, the forgotten may be ``easier``."""
    rng = numpy_generator(seed, "invented")
    hard = rng.normal(0, 3, len(INSIDE)) + easier * INSIDE
    return sure(hard + leak * INSIDE + rng.normal(0, 1, len(INSIDE))), [
        sure(hard + rng.normal(0, 1, len(INSIDE))) for _ in range(RETRAINED)
    ]


def test_what_leaks_is_found_what_leaks_less_less_and_the_retrained_are_at_chance() -> None:
    areas = []
    for leak in (0.0, 1.0, 2.5):
        model, retrained = models(leak)
        areas.append(attacked(model, retrained))
        null = interval(each_left_out(retrained))
        assert null["low"] < 0.5 < null["high"]  # type: ignore[operator]
    none, some, much = areas
    assert none["low"] < 0.5 < none["high"]  # type: ignore[operator]
    assert 0.5 < some["low"] < some["high"] < much["low"]  # type: ignore[operator]


def test_images_that_are_easier_for_every_model_do_not_look_learnt() -> None:
    model, retrained = models(0.0, easier=4.0)
    assert attacked(sure(model.phi), [sure(np.zeros(len(INSIDE)))] * 5)["value"] > 0.75  # type: ignore[operator]
    found = attacked(model, retrained)
    assert found["low"] < 0.5 < found["high"]  # type: ignore[operator]
    assert each_left_out(retrained) == pytest.approx([0.5] * RETRAINED, abs=0.12)


def test_the_attack_is_the_formula_by_patient() -> None:
    rng = numpy_generator(1, "formula")
    inside, patients = np.array([True] * 4 + [False] * 3), np.array([0, 0, 1, 2, 3, 4, 4])
    phi, phis = rng.normal(0, 1, 7), rng.normal(0, 1, (3, 7))
    spread = np.sqrt(phis.var(0, ddof=1).mean())
    z = norm.ppf(norm.cdf(phi, phis.mean(0), spread))
    one = [np.mean(z[patients == p]) for p in range(5)]
    wins = np.mean([one[a] > one[b] for a in (0, 1, 2) for b in (3, 4)])

    def of(row: np.ndarray) -> Sureness:
        return Sureness(phi=row, patients=patients, inside=inside)

    assert attacked(of(phi), [of(row) for row in phis])["value"] == pytest.approx(wins)
    assert each_left_out([of(row) for row in phis])[1] == attacked(of(phis[1]), [of(phis[0]), of(phis[2])])["value"]


def test_patients_of_the_two_sides_are_told_apart_and_sureness_does_not_cancel() -> None:
    logits, labels = torch.tensor([[60.0, 0.0], [0.0, 3.0]], dtype=torch.float64), np.array([0, 0])
    found = sureness((logits, labels, np.array([4, 5])), (logits, labels, np.array([4, 4])))
    assert found.phi == pytest.approx([60, -3, 60, -3])
    assert len(set(found.patients[:2]) | set(found.patients[2:])) == 3
    assert list(found.inside) == [True, True, False, False]


def tokens_of(rows: np.ndarray, tokens: np.ndarray, labels: np.ndarray, split: int) -> TokenSet:
    return TokenSet(
        tokens=tokens[rows],
        labels=labels[rows],
        groups=np.arange(len(rows)),
        split=np.full(len(rows), split, dtype=np.int8),
        classes=("alpha", "beta", "gamma"),
        keys=rows.astype(np.uint64),
    )


@pytest.mark.slow
def test_what_was_learnt_by_heart_is_found_until_it_is_forgotten() -> None:
    """Noise with labels drawn by lot: the original knows the forgotten, the retrained do not, NegGrad+ less."""
    method, each, rng = make("fedit"), 36, numpy_generator(0, "by heart")
    backbone = backbone_of(method)
    images = rng.integers(0, 255, (3 * each, *backbone.image_size, 3)).astype(np.uint8)
    tokens, labels = backbone.prefix(images).numpy(), rng.integers(0, 3, 3 * each)
    gone, kept, unseen = np.split(np.arange(3 * each), 3)

    def learner(rows: np.ndarray, seed: int) -> Learner:
        settings = TrainSettings(steps=40, batch_size=16, lr=1e-2, balance="none")
        data = tokens_of(rows, tokens, labels, 0)
        return Learner(backbone=backbone, data=data, settings=settings, seed=seed, site="a", round=1, rounds=1)

    def fit(rows: np.ndarray, seed: int) -> Tensors:
        return learner(rows, seed).fit(initial_params(backbone, method, "a", rank=16, seed=seed))

    original, retrained = fit(np.r_[gone, kept], 0), [fit(kept, seed) for seed in range(1, 6)]
    going, staying = learner(gone, 7), learner(kept, 7)
    away = going.batches(20, "forgotten")

    def negative(leaves: Tensors, batch: Batch) -> Tensor:
        return 0.7 * staying.loss(leaves, batch) - 0.3 * staying.loss(leaves, next(away))

    data = {split: tokens_of(rows, tokens, labels, split) for split, rows in ((0, gone), (1, unseen), (2, kept))}
    asked = Asked(
        kept={"a": data[2]},
        gone={"a": data[0]},
        unseen={"a": (data[1], np.arange(each))},
        backbone_of=lambda site: backbone,
        seed=0,
    )
    before, others = answer(asked, lambda site: original), [answer(asked, lambda site, p=p: p) for p in retrained]  # type: ignore[misc]
    negated = staying.fit(original, steps=20, loss=negative)
    found = judge(answer(asked, lambda site: negated), before, others, ("general",))["attack"]
    first, least, null = found["before"], found["after"], found["retrained"]
    print(f"\nLiRA: original {first['value']:.2f}, NegGrad+ {least['value']:.2f}, retrained {null['mean']:.2f}")
    assert first["low"] > 0.6
    assert null["low"] < 0.5 < null["high"]
    assert abs(null["mean"] - 0.5) < 0.1
    assert least["value"] < first["low"]

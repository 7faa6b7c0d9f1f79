"""Where features lie: a mean that costs a few noisy steps, and heads that are trained on what differs from it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_variants import VARIANTS
from noisy import EVERYBODY, check_sensitivity, moved, noisy_learner
from tiny_federation import backbone_of, initial_params, tiny_data

from confrere import centre
from confrere.backbones import load
from confrere.centre import Coordinates
from confrere.method import make
from confrere.noisy import NoisyLearner
from confrere.optimiser import AdamW
from confrere.tensors import Tensors

CENTRED = replace(EVERYBODY, centred=True)
FEDIT = make("fedit")
PRIVATE = {n: m for n, m in VARIANTS.items() if m.noised(4, 1, 3) is not None}


def params_of(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = initial_params(backbone_of(FEDIT), FEDIT, "a")
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(params.items())}


def features(learner: NoisyLearner, params: Tensors) -> torch.Tensor:
    with torch.no_grad():
        return learner.backbone.features(params, learner.data.batch(learner.data.rows("train")).tokens)


def test_without_noise_and_clip_steps_are_those_of_centred_features() -> None:
    """One step finds the mean feature, four are AdamW on the mean gradient of ``W (f - c) + b'``."""
    learner, params = noisy_learner(FEDIT, replace(CENTRED, clip=1e9)), params_of()
    middle = features(learner, params).mean(0)
    leaves = {n: t.clone() for n, t in params.items()}
    leaves["head.bias"] = leaves["head.bias"] + leaves["head.weight"] @ middle
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    optimiser = AdamW(list(leaves.values()), lr=5e-3, weight_decay=0.01)
    batch = learner.data.batch(learner.data.rows("train"))
    for _ in range(4):
        optimiser.zero_grad()
        found = learner.backbone.features(leaves, batch.tokens) - middle
        learner._task(found @ leaves["head.weight"].T + leaves["head.bias"], batch.labels).backward()
        optimiser.step()
    fitted = learner.fit(params, steps=5)
    kept = learner.beside[centre.GROUP]
    torch.testing.assert_close(centre.mean(kept), middle, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        slow = learner.backbone.features(leaves, batch.tokens) - middle
        slow = slow @ leaves["head.weight"].T + leaves["head.bias"]
        quick = learner.backbone.logits(fitted, batch.tokens)
    torch.testing.assert_close(quick, slow, atol=1e-5, rtol=1e-5)
    plain = noisy_learner(FEDIT, replace(EVERYBODY, clip=1e9)).fit(params, steps=5)
    assert not torch.allclose(plain["head.weight"], fitted["head.weight"], atol=1e-4)


@pytest.mark.parametrize("name", PRIVATE)
def test_one_image_moves_each_release_by_the_clip_at_most(name: str) -> None:
    """Also that of the mean, however strange the image is."""
    unnoised = name == "fedopal-in-turn"
    change = (lambda state: moved(state, 1)) if unnoised else (lambda state: state)
    check_sensitivity(PRIVATE[name], change, mechanism=CENTRED)


def test_a_mean_without_clip_and_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: whatever is made of the images' features is in every gradient that follows."""
    check_sensitivity(mechanism=CENTRED)

    def bare(self: Any, params: Tensors, *_: Any) -> tuple[int, Coordinates]:
        return 0, Coordinates(features(self, params).mean(0))

    monkeypatch.setattr(NoisyLearner, "_centre", bare)
    with pytest.raises(AssertionError, match="times the clip"):
        check_sensitivity(mechanism=CENTRED)


def test_a_mean_costs_steps_that_were_debited_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many releases as steps; the first is of the mean as long as that is noisy, and of none where there is one."""
    released: list[str] = []
    honest = NoisyLearner._gradient

    def noted(self: Any, fixed: Any, trained: Any, *rest: Any) -> Any:
        released.append(next(iter(trained)) if len(trained) == 1 else "all")
        return honest(self, fixed, trained, *rest)

    monkeypatch.setattr(NoisyLearner, "_gradient", noted)
    learner = noisy_learner(FEDIT, CENTRED)
    learner.fit(params_of(), steps=3)
    learner.fit(params_of(), steps=3)  # without noise one look is enough
    assert released == ["centre", "all", "all", "all", "all", "all"]
    assert learner.steps_left == 99 - 6
    released.clear()
    loud = noisy_learner(FEDIT, replace(CENTRED, sigma=30.0))
    for _ in range(3):
        loud.fit(params_of(), steps=2)
    loud.fit(params_of(), steps=1)
    assert released == ["centre", "all"] * 3 + ["all"]
    assert loud.beside[centre.GROUP]["said"][0] == 3
    released.clear()
    noisy_learner(FEDIT, CENTRED).fit(params_of(), steps=2, train=lambda name: not name.startswith("head."))
    assert released == ["all", "all"]


def test_what_is_kept_goes_on_in_the_next_round() -> None:
    first = noisy_learner(FEDIT, replace(CENTRED, sigma=1.0))
    first.fit(params_of(), steps=2)
    kept = first.beside[centre.GROUP]
    second = noisy_learner(FEDIT, replace(CENTRED, sigma=1.0))
    second.beside = {centre.GROUP: kept}
    second.fit(params_of(), steps=2, tag="again")
    both = second.beside[centre.GROUP]
    assert both["said"].tolist() == [2.0, pytest.approx(2 * float(kept["said"][1]))]
    assert not torch.equal(both["total"], 2 * kept["total"])


def test_the_noise_of_the_mean_is_what_is_said() -> None:
    """Over many seeds the squared distance from the mean feature is the variance that is kept."""
    mechanism = replace(CENTRED, sigma=0.5)
    apart, said = [], 0.0
    for seed in range(1, 41):
        learner = noisy_learner(FEDIT, replace(mechanism, noise_seed=seed))
        learner.fit(params_of(), steps=2)
        kept = learner.beside[centre.GROUP]
        far = centre.reach(learner.backbone, params_of())
        each = features(learner, params_of())
        short = each * (far / each.norm(dim=1, keepdim=True)).clamp(max=1.0)
        apart.append(float((kept["total"] - short.mean(0)).square().sum()))
        said = float(kept["said"][1])
    width = learner.backbone.feature_dim
    assert np.mean(apart) == pytest.approx(said, rel=5 * math.sqrt(2 / (40 * width)))


@given(variance=st.floats(0, 1e6), count=st.integers(1, 20), size=st.floats(1e-3, 1e3))
def test_a_mean_is_shortened_by_its_noise_and_never_turned(variance: float, count: int, size: float) -> None:
    total = count * size * torch.ones(4)
    kept = {"total": total, "said": torch.tensor([count, variance * count], dtype=torch.float64)}
    share = float(centre.mean(kept)[0]) / size
    assert 0 <= share <= 1 + 1e-6
    assert share == pytest.approx(max(0.0, 1 - variance / count / (4 * size**2)), abs=1e-4)


@given(st.integers(0, 1000))
def test_both_coordinates_are_the_same_model(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    params = {"head.weight": torch.randn(3, 5, generator=g), "head.bias": torch.randn(3, generator=g)}
    at = Coordinates(10 * torch.randn(5, generator=g))
    inside, feature = at.enter(params), torch.randn(5, generator=g)
    torch.testing.assert_close(at.leave(inside)["head.bias"], params["head.bias"], atol=1e-4, rtol=1e-4)
    assert at.middle is not None
    centred = inside["head.weight"] @ (feature - at.middle) + inside["head.bias"]
    plain = params["head.weight"] @ feature + params["head.bias"]
    torch.testing.assert_close(centred, plain, atol=1e-4, rtol=1e-4)
    assert Coordinates().enter(params) is Coordinates().leave(params) is params


def test_only_heads_that_read_one_feature_vector_are_centred() -> None:
    backbone = backbone_of(FEDIT)
    assert centre.applies(backbone, params_of())
    assert not centre.applies(backbone, ["head.weight"])
    table = load("mlp", lora=backbone.spec, image_size=(1, 6))
    assert not centre.applies(table, params_of())


def test_the_reach_is_that_of_pictures_of_nobody() -> None:
    learner = noisy_learner(FEDIT, CENTRED)
    again = noisy_learner(FEDIT, CENTRED, tiny_data(learner.backbone, "b"))
    assert centre.reach(learner.backbone, params_of()) == centre.reach(again.backbone, params_of()) > 0

"""What tests of noisy steps share: a tiny site that hides its images, and checks that a planted bug has to fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from tiny_federation import backbone_of, initial_params, tiny_data

import confrere.noisy as noisy
from confrere.learner import TrainSettings
from confrere.method import Method, make
from confrere.noisy import NoisyLearner
from confrere.privacy import mechanism as steps
from confrere.privacy.mechanism import Mechanism
from confrere.tensors import State, Tensors
from confrere.tokenset import TokenSet

CLIP = 0.5
EVERYBODY = Mechanism(unit="record", units=12, rate=1.0, sigma=0.0, clip=CLIP, noise_seed=1)


def noisy_learner(
    method: Method, mechanism: Mechanism = EVERYBODY, data: TokenSet | None = None, **changes: Any
) -> NoisyLearner:
    """Return what site ``a`` trains with in round 1, allowed any number of steps."""
    settings = {"steps": 2, "batch_size": 6, "balance": "none", "lr": 5e-3} | changes
    backbone = backbone_of(method)
    return NoisyLearner(
        backbone=backbone,
        data=tiny_data(backbone, "a") if data is None else data,
        settings=TrainSettings(**settings),
        seed=0,
        site="a",
        round=2,
        rounds=3,
        mechanism=mechanism,
        steps_left=99,
    )


def sums(
    method: Method, data: TokenSet, received: State, kept: State, mechanism: Mechanism = EVERYBODY
) -> list[dict[str, torch.Tensor]]:
    """Return the clipped sums of the first two noisy steps that ``update`` makes from all images, before noise.

    The second is taken where the first left the tensors if it had released zeros.
    """

    class SeenError(Exception):
        pass

    found: list[dict[str, torch.Tensor]] = []

    def look(total: dict[str, torch.Tensor], mechanism: Mechanism, source: object) -> dict[str, torch.Tensor]:
        found.append(total)
        if len(found) == 2:
            raise SeenError
        return {name: torch.zeros(value.shape) for name, value in total.items()}

    before, noisy.noisy_mean = noisy.noisy_mean, look  # type: ignore[assignment]
    try:
        method.update(noisy_learner(method, mechanism, data, steps=4), received, kept)
    except SeenError:
        pass
    finally:
        noisy.noisy_mean = before
    return found


def with_outlier(data: TokenSet) -> TokenSet:
    """Return the images, of which the first training one is far from all others."""
    tokens = np.array(data.tokens[np.arange(len(data.labels))])
    tokens[data.rows("train")[0]] *= 1000.0
    return replace(data, tokens=tokens)


def without_first(data: TokenSet) -> TokenSet:
    """Return the neighbour: the first training image does not train."""
    split = data.split.copy()
    split[data.rows("train")[0]] = 1
    return replace(data, split=split)


def moved(state: State, seed: int) -> State:
    """Return a site's own tensors as another set of images, without noise, might have left them."""
    generator = torch.Generator().manual_seed(seed)
    own = {n: t + torch.randn(t.shape, generator=generator) for n, t in sorted(state.get("private", {}).items())}
    return {**state, "private": own}


def distance(left: Tensors, right: Tensors) -> float:
    return math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in left))


def check_sensitivity(
    method: Method | None = None,
    change: Callable[[State], State] = lambda state: state,
    images: int = 24,
    mechanism: Mechanism = EVERYBODY,
) -> None:
    """One image, however strange, moves the sum of each step by the clip at most; it does move it."""
    method = method or make("fedit")
    backbone = backbone_of(method)
    params = initial_params(backbone, method, "a")
    generator = torch.Generator().manual_seed(3)
    params = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(params.items())}
    received, kept = method.broadcast(method.init_server(params), "a"), method.init_site(params)
    data = with_outlier(tiny_data(backbone, "a", images))
    every = sums(method, data, received, kept, mechanism)
    others = sums(method, without_first(data), received, change(kept), mechanism)
    gaps = [distance(one, other) / CLIP for one, other in zip(every, others, strict=True)]
    assert max(gaps) <= 1, f"one image moved the sums by {gaps} times the clip"
    assert gaps[0] > 0.3, "the strange image is not strange"


def check_noise(seed: int = 1) -> None:
    """What is added has the variance that is accounted, in every tensor, and is new at every step."""
    mechanism = replace(EVERYBODY, sigma=3.0, rate=0.5, noise_seed=seed)
    learner = noisy_learner(make("fedit"), replace(mechanism, rate=1e-12))  # nobody is drawn
    params = {n: t.requires_grad_() for n, t in initial_params(learner.backbone, make("fedit"), "a").items()}
    learner.mechanism = replace(mechanism, rate=1e-12)
    found = [learner._gradient({}, params, "fit", step) for step in range(30)]
    scale = CLIP * 3.0 / learner.mechanism.expected
    for name in params:
        drawn = torch.cat([one[name].flatten() for one in found]).double().numpy() / scale
        assert len(np.unique(drawn)) > 0.99 * len(drawn), f"the noise of {name} repeats itself"
        assert stats.kstest(drawn, "norm").pvalue > 1e-4, f"the noise of {name} is not standard normal"
    every = torch.cat([g.flatten() for one in found for g in one.values()]).double().numpy() / scale
    assert abs(every.std() - 1) < 5 / math.sqrt(2 * len(every))


def check_sampling(rows: int = 40, rate: float = 0.2, rounds: int = 2000, seed: int = 1) -> None:
    """Everybody is drawn by itself with the accounted chance: sizes vary as a binomial number, some are empty."""
    mechanism = replace(EVERYBODY, units=rows, rate=rate)
    numbers, groups = np.arange(100, 100 + rows), np.arange(rows)
    drawn = [steps.draw(mechanism, numbers, groups, noisy.Source(seed, step))[0][:, 0] for step in range(rounds)]
    sizes = np.array([len(one) for one in drawn])
    assert abs(sizes.mean() - rows * rate) < 5 * math.sqrt(rows * rate * (1 - rate) / rounds)
    assert abs(sizes.var() / (rows * rate * (1 - rate)) - 1) < 5 * math.sqrt(2 / rounds), (
        "sizes do not vary as they should"
    )
    shares = np.array([[number in one for number in numbers[:6]] for one in map(set, drawn)]).astype(float)
    assert (abs(shares.mean(0) - rate) < 5 * math.sqrt(rate * (1 - rate) / rounds)).all()
    apart = np.corrcoef(shares.T)[np.triu_indices(6, 1)]
    assert (abs(apart) < 5 / math.sqrt(rounds)).all(), "who is drawn depends on who else is"
    after = np.corrcoef(shares[1:, 0], shares[:-1, 0])[0, 1]
    assert abs(after) < 5 / math.sqrt(rounds), "who is drawn depends on the step before"

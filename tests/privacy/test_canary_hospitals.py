"""G24: one run of DPFed with a thousand hospitals that each push in a random direction, as far as the clip allows.

After Andrew et al., *One-shot Empirical Privacy Estimation for Federated Learning* (arXiv 2302.03098), last iterate:
how much the model moved along the directions of those who took part is set beside directions of nobody. What tells the
two normal distributions apart is an estimate of epsilon (no bound: nothing says that no attack does better).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm as normal

from confrere.method import Reply
from confrere.methods.dpfed import DPFed
from confrere.methods.noise import normal as noise
from confrere.privacy import epsilon
from confrere.seeds import torch_generator

HOSPITALS, NUMBERS, ROUNDS, DELTA, SIGMA = 1000, 20_000, 4, 1e-3, 4.0
REPORTED = epsilon(SIGMA, rounds=ROUNDS, delta=DELTA)


def shifts(method: DPFed, seed: int) -> np.ndarray:
    """Return how far each hospital's direction shows in the last model, in standard deviations of nobody's."""
    pushes = torch.randn(HOSPITALS, NUMBERS, generator=torch_generator(seed, "pushes"))
    pushes *= (1 - 1e-6) * method.clip / pushes.norm(dim=1, keepdim=True)
    server = method.expecting(method.init_server({"adapter": torch.zeros(NUMBERS)}), float(HOSPITALS))
    for round_ in range(1, ROUNDS + 1):
        at = server["shared"]["adapter"]
        states = [{"shared": {"adapter": at + push}} for push in pushes]
        replies = [Reply(site=f"s{k}", round=round_, state=state) for k, state in enumerate(states)]
        server = method.aggregate(server, replies)
    moved = server["shared"]["adapter"]
    cosines = pushes @ moved / (pushes.norm(dim=1) * moved.norm())
    return np.asarray(cosines.double()) * math.sqrt(NUMBERS)


def told_apart(mean: float, spread: float) -> float:
    """Return the least epsilon at DELTA for which N(mean, spread^2) and N(0, 1) are as alike as it says, on a grid."""
    at = np.linspace(-12, mean + 12 * max(1.0, spread), 40_001)
    with_it, without = normal.pdf(at, mean, spread), normal.pdf(at)

    def delta(epsilon_: float) -> float:
        pairs = ((with_it, without), (without, with_it))
        return max(float(np.trapezoid(np.maximum(p - math.exp(epsilon_) * q, 0), at)) for p, q in pairs)

    low, high = 0.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


def estimate(method: DPFed, seed: int) -> tuple[float, float]:
    """Return the estimate, and the same from the lower end of the mean's 95 % interval."""
    found = shifts(method, seed)
    error = 1.96 * found.std() / math.sqrt(len(found))
    return told_apart(found.mean(), found.std()), told_apart(max(0.0, found.mean() - error), 1.0)


def method(noise_seed: int, sigma: float = SIGMA) -> DPFed:
    return DPFed(clip=0.3, sigma=sigma, post=0.0, noise_seed=noise_seed)


def test_two_normal_distributions_are_told_apart_as_the_accountant_says() -> None:
    assert told_apart(math.sqrt(ROUNDS) / SIGMA, 1.0) == pytest.approx(REPORTED, rel=0.02)


def test_canary_hospitals_show_what_is_reported_and_no_more() -> None:
    found = [estimate(method(seed + 1), seed) for seed in range(3)]
    middle = float(np.mean([one for one, _ in found]))
    print(f"\nG24: epsilon {REPORTED:.2f} reported, {middle:.2f} estimated (three seeds)")
    assert sorted(low for _, low in found)[1] <= REPORTED  # each may fail in one of forty
    assert middle > 0.7 * REPORTED, "the canaries see nothing"


@pytest.mark.parametrize("bug", ["half of the noise", "a quarter of the noise", "noise off"])
def test_a_planted_bug_shows(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    share = {"half of the noise": 0.5, "a quarter of the noise": 0.25, "noise off": 1e-6}[bug]
    monkeypatch.setattr("confrere.methods.dpfed.normal", lambda *given: share * noise(*given))
    found, low = estimate(method(1), 0)
    print(f"\nG24: {bug}: {found:.2f} estimated, {REPORTED:.2f} reported")
    assert low > REPORTED

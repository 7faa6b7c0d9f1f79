"""What leaks more and what defends, on digits, three seeds: what docs/results/property-inference.md calls reproducible.

Not asserted: that PROLIN's joint estimate beats a ridge, which did not reproduce.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confrere.audits.property import posterior
from confrere.federation.participation import identifiability

SEEDS, SHADOWS = (0, 1, 2), 200

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "recipes")
        import property_digits

        yield property_digits


@pytest.fixture(scope="module")
def plain(digits: Any) -> list[Any]:
    return [digits.run_toy(seed, 60, shadows=SHADOWS) for seed in SEEDS]


def f1s(digits: Any, toys: list[Any], rounds: int) -> dict[str, np.ndarray]:
    found = [digits.decisions(toy, rounds) for toy in toys]
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def test_the_posterior_finds_who_has_the_property_and_its_control_does_not(digits: Any, plain: list[Any]) -> None:
    found = f1s(digits, plain, 60)
    print({name: pairs.mean(0).round(2).tolist() for name, pairs in found.items()})
    assert (found["posterior"][:, 0] >= 0.9).all()
    assert found["control"][:, 0].mean() < 0.5 < found["control"][:, 1].mean() + 0.25 < 1.0
    assert (found["posterior"][:, 1] > found["control"][:, 1] + 0.1).all()
    for toy in plain:
        estimate = posterior(toy.system, digits.POSITIVE / digits.SITES)
        assert ((toy.truth >= estimate.low) & (toy.truth <= estimate.high)).mean() >= 0.85


def test_least_squares_fails_where_there_are_as_many_rounds_as_sites(digits: Any, plain: list[Any]) -> None:
    before, at, after = (f1s(digits, plain, rounds) for rounds in (30, 40, 60))
    assert at["least squares"][:, 0].mean() < before["least squares"][:, 0].mean() - 0.1
    assert at["least squares"][:, 0].mean() < after["least squares"][:, 0].mean() - 0.1
    assert at["posterior"][:, 0].mean() > at["ridge"][:, 0].mean() - 0.05 > at["least squares"][:, 0].mean() - 0.05
    assert at["disaggregation"][:, 0].mean() < after["disaggregation"][:, 0].mean() - 0.1


def test_fixed_groups_leave_no_single_site_to_be_found(digits: Any) -> None:
    toys = [digits.run_toy(seed, 40, shadows=SHADOWS, sampling="groups") for seed in SEEDS]
    for toy in toys:
        seen = identifiability(toy.system.A, [str(k) for k in range(digits.SITES)])
        assert (seen.rank, seen.single) == (5, ())
        assert posterior(toy.system, 0.2).sd.min() > 0.3  # of 0.4 without any sum
    found = f1s(digits, toys, 40)
    base = 2 * digits.POSITIVE / (digits.SITES + digits.POSITIVE)  # F1 of calling everybody positive
    for name in ("posterior", "ridge", "least squares", "disaggregation"):
        assert found[name][:, 0].mean() <= base, name


def test_noise_that_hides_a_site_hides_its_property(digits: Any) -> None:
    sigma = digits.noise_for(8.0, 40)
    toys = [digits.run_toy(seed, 40, shadows=SHADOWS, clip=0.35, noise=sigma) for seed in SEEDS]
    found = f1s(digits, toys, 40)
    for name in ("posterior", "ridge", "least squares", "disaggregation"):
        assert found[name][:, 0].mean() < 0.45, name
        assert abs(found[name][:, 1].mean() - 0.5) < 0.25, name

"""The estimators of property inference, each against a slow independent truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.audits import property_prolin
from confrere.audits.property import (
    System,
    density,
    least_squares,
    posterior,
    ridge,
    score_of_sum,
    vote,
)
from confrere.audits.property_classifier import persistence, train_score
from confrere.errors import ConfigError
from confrere.optimiser import AdamW

PARTS = ("b", "mean_with", "var_with", "mean_without", "var_without")


def system(seed: int = 0, rounds: int = 12, sites: int = 6, **changes: object) -> System:
    rng = np.random.default_rng(seed)
    made = System(
        A=rng.integers(0, 2, (rounds, sites)).astype(float),
        b=rng.normal(size=rounds),
        mean_with=rng.normal(2, 0.3, rounds),
        var_with=rng.uniform(0.5, 1, rounds),
        mean_without=rng.normal(-2, 0.3, rounds),
        var_without=rng.uniform(0.5, 1, rounds),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def drawn(rng: np.random.Generator, rounds: int, sites: int, rho: float, prior: float) -> tuple[System, np.ndarray]:
    """Return a system that follows the posterior's model, and the Gaussian tau behind it."""
    tau = prior + np.sqrt(prior * (1 - prior)) * rng.normal(size=sites)
    made = system(int(rng.integers(2**31)), rounds, sites, persistence=rho)
    spread = np.sqrt(prior * made.var_with + (1 - prior) * made.var_without)[:, None]
    odd = np.sqrt(rho) * rng.normal(size=sites) + np.sqrt(1 - rho) * rng.normal(size=(rounds, sites))
    scores = made.mean_without[:, None] + tau * (made.mean_with - made.mean_without)[:, None] + spread * odd
    return replace(made, b=(made.A * scores).sum(1)), tau


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_score_of_a_sum_is_the_sum_of_the_scores(seed: int, members: int) -> None:
    rng = np.random.default_rng(seed)
    updates, c, a, row = rng.normal(size=(members, 7)), rng.normal(size=7), 1.5, rng.uniform(0.2, 3, members)
    assert score_of_sum(c, a, row @ updates, row) == pytest.approx(float(row @ (updates @ c + a)))


def test_least_squares_and_ridge_are_the_minima_they_are_said_to_be() -> None:
    s = system()
    np.testing.assert_allclose(least_squares(s), np.linalg.pinv(s.A) @ s.b, atol=1e-9)
    rng, best = np.random.default_rng(1), ridge(s, 0.7)

    def loss(x: np.ndarray) -> float:
        return float((s.weights * (s.A @ x - s.b) ** 2).sum() + 0.7 * (x**2).sum())

    assert all(loss(best) < loss(best + 1e-3 * rng.normal(size=best.size)) for _ in range(50))


def test_round_weights_are_one_minus_the_overlap_of_the_two_normals() -> None:
    s, x = system(3), np.linspace(-20, 20, 200_001)

    def curve(mean: float, variance: float) -> np.ndarray:
        return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)

    for r in range(3):
        both = np.minimum(curve(s.mean_with[r], s.var_with[r]), curve(s.mean_without[r], s.var_without[r]))
        assert s.weights[r] == pytest.approx(1 - np.trapezoid(both, x), abs=1e-6)


def test_the_density_decision_is_the_best_vertex_of_its_linear_programme() -> None:
    s = system(4)
    x = ridge(s)
    for k, found in enumerate(density(s, x)):

        def value(tau: float, k: int = k) -> float:
            pdf = [torch.distributions.Normal(float(m), float(v) ** 0.5).log_prob(torch.tensor(x[k])).exp().item()
                   for m, v in [*zip(s.mean_with, s.var_with, strict=True),
                                *zip(s.mean_without, s.var_without, strict=True)]]  # fmt: skip
            with_, without = np.split(np.array(pdf), 2)
            return float((s.A[:, k] * (tau * with_ + (1 - tau) * without)).sum())

        assert value(1) - value(0) == pytest.approx(found, rel=1e-4, abs=1e-6)  # torch's normals are float32


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.4, 0.95]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_posterior_conditions_the_joint_normal(seed: int, rho: float, noisy: bool) -> None:
    rng, prior = np.random.default_rng(seed), 0.3
    shift = 0.7 * noisy
    s = system(seed % 1000, rounds=5, sites=4, persistence=rho, shift=shift)
    s = replace(s, A=s.A * rng.uniform(0.5, 2, 4), noise=rng.uniform(0.1, 1, 5) if noisy else None)
    s = replace(s, A=np.where(s.A.sum(1, keepdims=True) > 0, s.A, 1.0))
    delta, spread = s.mean_with - s.mean_without, prior * (1 - prior)
    # tau and every site's deviations, written out one by one: b is linear in them.
    sd = np.sqrt(prior * s.var_with + (1 - prior) * s.var_without)
    parts = [np.sqrt(spread) * (s.A * delta[:, None]), np.sqrt(rho) * s.A * sd[:, None]]
    parts += [np.sqrt(1 - rho) * np.diag(s.A[:, k] * sd) for k in range(4)]
    parts += [shift * (sd * s.A.sum(1))[:, None]]
    parts += [np.diag(np.sqrt(s.noise))] if s.noise is not None else []
    load = np.concatenate(parts, 1)
    cross = np.sqrt(spread) * load[:, :4].T
    cov = load @ load.T
    rest = s.b - s.A.sum(1) * s.mean_without - prior * s.A.sum(1) * delta
    found = posterior(s, prior)
    np.testing.assert_allclose(found.mean, prior + cross @ np.linalg.pinv(cov) @ rest, atol=1e-6)
    left = spread * np.eye(4) - cross @ np.linalg.pinv(cov) @ cross.T
    np.testing.assert_allclose(found.sd, np.sqrt(np.clip(np.diag(left), 0, None)), atol=1e-5)


def test_the_posterior_covers_and_persistence_left_out_does_not() -> None:
    rng, covered, careless = np.random.default_rng(5), [], []
    for _ in range(60):
        s, tau = drawn(rng, 80, 10, 0.8, 0.5)
        for into, one in ((covered, s), (careless, replace(s, persistence=0.0))):
            found = posterior(one, 0.5)
            into += list(np.abs(found.mean - tau) <= 1.96 * found.sd)
    assert 0.92 < np.mean(covered) < 0.98
    assert np.mean(careless) < 0.85


def test_a_site_that_never_took_part_keeps_its_prior() -> None:
    s = system(6)
    s = replace(s, A=np.where(np.arange(6) == 2, 0.0, s.A))
    found = posterior(s, 0.25)
    assert (found.mean[2], found.sd[2]) == pytest.approx((0.25, (0.25 * 0.75) ** 0.5))
    empty = replace(s, A=np.zeros_like(s.A), b=np.zeros(12))
    np.testing.assert_allclose(posterior(empty, 0.25).mean, 0.25)


def test_votes_are_those_of_disaggregated_updates() -> None:
    rng = np.random.default_rng(7)
    A, updates = rng.integers(0, 2, (9, 4)).astype(float), rng.normal(size=(4, 5))
    directions, offsets = rng.normal(size=(9, 5)), rng.normal(size=9)
    assert np.linalg.matrix_rank(A) == 4
    wanted = [np.mean([directions[r] @ u + offsets[r] > 0 for r in range(9)]) for u in updates]
    np.testing.assert_allclose(vote(A, A @ updates, directions, offsets), wanted)


def test_gradients_of_the_joint_losses_are_those_of_autograd() -> None:
    s = system(8)
    rng = np.random.default_rng(0)
    s = replace(s, A=s.A * rng.uniform(0.5, 2, 6))
    X, tau, anchor = rng.normal(size=s.A.shape), rng.random(6), rng.normal(size=6)
    values, of_x, of_tau = property_prolin.losses(s, X, tau, anchor, s.weights)
    x, t = torch.tensor(X, requires_grad=True), torch.tensor(tau, requires_grad=True)
    A, part = torch.tensor(s.A), torch.tensor((s.A > 0).astype(float))

    def pdf(mean: np.ndarray, variance: np.ndarray) -> torch.Tensor:
        normals = torch.distributions.Normal(torch.tensor(mean)[:, None], torch.tensor(variance)[:, None].sqrt())
        return normals.log_prob(x).exp()

    mixed = t * pdf(s.mean_with, s.var_with) + (1 - t) * pdf(s.mean_without, s.var_without)
    wanted = [
        -torch.log1p(part * mixed).sum(),
        (torch.tensor(s.weights) * (torch.tensor(s.b) - (A * x).sum(1)) ** 2).sum(),
        (((part * x).sum(0) - part.sum(0) * torch.tensor(anchor)) ** 2).sum(),
    ]
    for i, one in enumerate(wanted):
        assert values[i] == pytest.approx(float(one.detach()))
        gradients = torch.autograd.grad(one, (x, t), allow_unused=True, retain_graph=True)
        np.testing.assert_allclose(of_x[i], gradients[0].numpy(), atol=1e-10)
        if i == 0:
            np.testing.assert_allclose(of_tau, gradients[1].numpy(), atol=1e-10)
        else:
            assert gradients[1] is None


def test_one_loss_makes_adam_of_mtadam() -> None:
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    adam, ours, at = (
        AdamW([start], lr=property_prolin.LR, weight_decay=0.0),
        property_prolin.MTAdam(),
        start.detach().numpy(),
    )
    at = at.copy()
    for _ in range(20):
        start.grad = 2 * start.detach()
        at = at - ours.step([2 * at])
        adam.step()
    np.testing.assert_allclose(at, start.detach().numpy(), atol=1e-12)


def test_a_second_loss_is_scaled_to_the_first() -> None:
    small, large = property_prolin.MTAdam(), property_prolin.MTAdam()
    g = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    np.testing.assert_allclose(small.step(g), large.step([g[0], 1e6 * g[1]]))


def test_prolin_finds_who_has_the_property_and_draws_by_its_seed() -> None:
    rng = np.random.default_rng(9)
    truth = np.array([1.0, 0, 0, 1, 0, 0])
    s = system(9, rounds=24)
    scores = np.where(truth > 0, s.mean_with[:, None], s.mean_without[:, None]) + 0.3 * rng.normal(size=s.A.shape)
    s = replace(s, b=(s.A * scores).sum(1))
    found = property_prolin.prolin(s, steps=2500)
    assert ((found > 0.5) == (truth > 0)).all()
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_array_equal(property_prolin.prolin(s, steps=50), property_prolin.prolin(s, steps=50))
    assert (property_prolin.prolin(s, steps=50) != property_prolin.prolin(s, steps=50, seed=1)).any()


@pytest.mark.parametrize("part", ["A", *PARTS])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rounds_that_make_no_system_are_refused(part: str, bad: float) -> None:
    value = getattr(system(), part).copy()
    value.flat[0] = bad
    with pytest.raises(ConfigError) as caught:
        system(**{part: value})
    assert caught.value.code == "audit"


@pytest.mark.parametrize(
    "changes",
    [
        {"A": -np.ones((12, 6))},
        {"b": np.zeros(3)},
        {"var_with": np.zeros(12)},
        {"persistence": 1.0},
        {"shift": np.inf},
        {"noise": np.full(12, np.nan)},
        {"A": np.ones(12)},
    ],
    ids=str,
)
def test_shapes_and_ranges_are_checked(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        system(**changes)


def shadows(seed: int = 0, size: int = 200, gap: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % 2 == 0
    updates = rng.normal(size=(size, 6)) * 1e-3
    updates[:, 1] += np.where(labels, gap, -gap) * 1e-3
    updates[:, 4] = 0.125  # a coordinate that never moves
    return updates, labels


def test_the_classifier_separates_and_its_score_is_affine() -> None:
    updates, labels = shadows()
    found = train_score(updates, labels, seed=0)
    assert found.accuracy == 1.0
    assert found.mean_with > 0 > found.mean_without
    assert found.direction[4] == 0
    scores = updates @ found.direction + found.offset
    assert ((scores > 0) == labels).mean() > 0.97
    assert len(found.deviations) == 40


def test_without_a_difference_the_classifier_is_no_better_than_chance() -> None:
    right = [train_score(*shadows(seed, 400, gap=0.0), seed=seed).accuracy for seed in range(10)]
    assert 0.42 < np.mean(right) < 0.58


def test_the_part_that_gives_the_moments_neither_trains_nor_chooses() -> None:
    updates, labels = shadows()
    first = train_score(updates, labels, seed=0)
    untouched = []
    for row in range(0, 200, 5):
        changed = updates.copy()
        changed[row] *= 1.01
        second = train_score(changed, labels, seed=0, epochs=2)
        plain = train_score(updates, labels, seed=0, epochs=2)
        if (second.direction == plain.direction).all() and second.mean_with + second.mean_without != (
            plain.mean_with + plain.mean_without
        ):
            untouched.append(row)
    assert 2 <= len(untouched) <= 16  # about a fifth of 40
    changed = updates.copy()
    changed[untouched] += 1.0
    np.testing.assert_array_equal(train_score(changed, labels, seed=0).direction, first.direction)


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_shadows_that_are_not_finite_or_too_few_are_refused(spoil: float) -> None:
    updates, labels = shadows()
    with pytest.raises(ConfigError):
        train_score(updates[:30], labels[:30], seed=0)
    updates[3, 2] = spoil
    with pytest.raises(ConfigError) as caught:
        train_score(updates, labels, seed=0)
    assert caught.value.code == "audit"


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_persistence_is_the_correlation_between_rounds(rho: float) -> None:
    rng = np.random.default_rng(0)
    deviations = np.sqrt(rho) * rng.normal(size=2000) + np.sqrt(1 - rho) * rng.normal(size=(8, 2000))
    assert persistence(deviations) == pytest.approx(rho, abs=0.03)
    assert persistence(deviations[:1]) == 0.0
    assert persistence(np.ones((3, 5))) == 0.99

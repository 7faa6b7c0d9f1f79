"""Curves against products and integrals written out, and against lifelines."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.errors import ConfigError, DataError
from confrere.survival import (
    breslow,
    cox_curves,
    edge_survival,
    equal_edges,
    interpolate,
    logistic_hazard,
    restricted_mean,
)

EDGES = (0.0, 1.0, 2.5, 4.0)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(["logistic-hazard", "deephit"]),
    how=st.sampled_from(["hazard", "density"]),
)
def test_curves_start_at_one_never_rise_and_have_the_area_that_is_said(seed, name, how):
    z = np.random.default_rng(seed).normal(size=(4, 3), scale=3)
    edge = edge_survival(name, z)
    assert edge.shape == (4, 4)
    assert (edge[:, 0] == 1).all()
    if name == "logistic-hazard":
        np.testing.assert_allclose(edge[:, 1:], np.cumprod(1 - 1 / (1 + np.exp(-z)), axis=1))
    else:
        p = np.exp(np.c_[z, np.zeros(4)])
        np.testing.assert_allclose(edge[:, 1:], 1 - np.cumsum(p / p.sum(1, keepdims=True), axis=1)[:, :3], atol=1e-12)
    grid = np.linspace(0, 4, 4001)
    fine = interpolate(edge, EDGES, grid, how=how)
    assert (np.diff(fine, axis=1) <= 1e-12).all()
    assert ((fine >= 0) & (fine <= 1)).all()
    np.testing.assert_allclose(interpolate(edge, EDGES, np.array(EDGES), how=how), edge, atol=1e-12)
    area = np.trapezoid(fine, grid, axis=1)
    np.testing.assert_allclose(restricted_mean(edge, EDGES, how=how), area, atol=2e-5)


def test_a_curve_that_falls_to_zero_has_no_nan():
    edge = np.array([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    found = interpolate(edge, EDGES, np.array([0.0, 1.0, 2.0, 3.0]))
    assert found.tolist() == [[1.0, 0.5, 0.0, 0.0], [1.0] * 4]
    assert restricted_mean(edge, EDGES, how="density").tolist() == [0.75 + 0.375, 4.0]
    hazard = restricted_mean(edge, EDGES)
    assert hazard[1] == 4.0
    assert hazard[0] == pytest.approx(0.5 / np.log(2))


def test_hazards_that_fit_best_are_the_life_table():
    """With one hazard for all, the loss is least where survival is the actuarial estimate of each whole bin."""
    g = np.random.default_rng(0)
    targets = torch.tensor(
        np.stack([g.choice([0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 6.0], 300), g.integers(0, 2, 300)], axis=1)
    )
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimiser.zero_grad()
        loss = logistic_hazard(z.expand(300, 3), targets, EDGES)
        loss.backward()
        return loss

    optimiser.step(closure)
    t, e = targets[:, 0].numpy(), targets[:, 1].numpy() > 0
    curve = [1.0]
    for low, high in pairwise(EDGES):
        dead = (e & (t > low) & (t <= high)).sum()
        through = (t > high).sum() + (~e & (t == high)).sum()
        curve.append(curve[-1] * through / (through + dead))
    np.testing.assert_allclose(edge_survival("logistic-hazard", z.detach().numpy())[0], curve, atol=1e-5)


@pytest.mark.slow  # the import alone takes seconds
def test_breslow_agrees_with_lifelines():
    pytest.importorskip("lifelines")
    from lifelines import CoxPHFitter
    from lifelines.datasets import load_rossi

    table = load_rossi()
    fitted = CoxPHFitter().fit(table, "week", "arrest")
    scores = fitted.predict_log_partial_hazard(table).to_numpy()
    base = breslow(scores, table["week"].to_numpy(), table["arrest"].to_numpy())
    theirs = fitted.baseline_cumulative_hazard_.iloc[:, 0]
    np.testing.assert_allclose(np.exp(base.log_hazard), theirs[base.times].to_numpy(), rtol=1e-6)
    at = np.array([1.0, 10.5, 52.0])
    theirs = fitted.predict_survival_function(table.iloc[:5], times=[1.0, 10.0, 52.0]).to_numpy().T
    np.testing.assert_allclose(cox_curves(scores[:5], base, at), theirs, rtol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), patients=st.integers(0, 12))
def test_breslow_by_its_definition(seed, patients):
    g = np.random.default_rng(seed)
    scores, times, events = g.normal(size=patients), g.integers(0, 5, patients), g.integers(0, 2, patients)
    base = breslow(scores, times, events)
    at = np.array([-1.0, 0.0, 1.5, 4.0])
    for j, when in enumerate(at):
        hazard = sum(
            1 / np.exp(scores[times >= t]).sum() for t, e in zip(times, events, strict=True) if e and t <= when
        )
        assert cox_curves(np.array([0.3]), base, at)[0, j] == pytest.approx(np.exp(-hazard * np.exp(0.3)))


def test_huge_scores_of_a_cox_model_give_zero_or_one():
    base = breslow(np.array([900.0, -900.0]), np.array([1.0, 2.0]), np.array([1, 1]))
    found = cox_curves(np.array([900.0, -900.0, 0.0]), base, np.array([0.5, 1.0, 2.0]))
    assert np.isfinite(found).all()
    assert found[0, 1] == pytest.approx(np.exp(-1))
    assert found[2].tolist() == [1.0, 1.0, 0.0]


def test_edges_are_public_steps_and_what_cannot_be_is_refused():
    assert equal_edges(60, 4) == (0.0, 15.0, 30.0, 45.0, 60.0)
    for horizon, bins in [(0, 3), (float("nan"), 3), (float("inf"), 3), (5, 0), (5, 2000)]:
        with pytest.raises(ConfigError):
            equal_edges(horizon, bins)
    edge = edge_survival("deephit", np.zeros((2, 3)))
    for times in ([-0.1], [4.1], [float("nan")]):
        with pytest.raises(DataError, match="horizon"):
            interpolate(edge, EDGES, np.array(times))
    with pytest.raises(ConfigError, match="no way"):
        interpolate(edge, EDGES, np.array([1.0]), how="spline")
    for name, z in [("cox", np.zeros((2, 1))), ("deephit", np.zeros(3)), ("deephit", np.full((1, 3), np.nan))]:
        with pytest.raises(DataError) as raised:
            edge_survival(name, z)
        assert raised.value.code == "prediction"

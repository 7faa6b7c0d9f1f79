"""Losses against loops over patients, bins and pairs; what decomposes over patients, and what does not."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.errors import ConfigError
from confrere.survival import cox, deephit, deephit_likelihood, discretise, equal_edges, logistic_hazard
from confrere.survival import losses as module

EDGES = (0.0, 1.0, 2.5, 4.0)


def batch(seed, patients=12, bins=3, ties=True):
    g = np.random.default_rng(seed)
    times = g.integers(0, 10, patients) / 2 if ties else g.uniform(0.01, 5, patients)
    targets = np.stack([times, g.integers(0, 2, patients)], axis=1)
    logits = g.normal(size=(patients, bins), scale=2)
    return torch.tensor(logits), torch.tensor(targets)


def bin_by_hand(time, event):
    """Return (survived bins, bin of the event or None)."""
    survived = 0
    for low, high in pairwise(EDGES):
        if event and (low < time <= high or time == low == 0):
            return survived, survived
        if time >= high:
            survived += 1
    return survived, None


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), patients=st.integers(1, 20))
def test_logistic_hazard_is_the_likelihood_written_as_a_product(seed, patients):
    logits, targets = batch(seed, patients)
    total = 0.0
    for z, (time, event) in zip(logits.tolist(), targets.tolist(), strict=True):
        h = [1 / (1 + math.exp(-x)) for x in z]
        survived, died = bin_by_hand(time, event)
        chance = math.prod(1 - x for x in h[:survived]) * (h[died] if died is not None else 1)
        total -= math.log(chance)
    assert float(logistic_hazard(logits, targets, EDGES)) == pytest.approx(total / patients)


def pmf_by_hand(z):
    e = [math.exp(x) for x in [*z, 0.0]]
    return [x / sum(e) for x in e]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), patients=st.integers(1, 12), alpha=st.sampled_from([0.0, 0.2, 1.0]))
def test_deephit_is_likelihood_and_ranking_by_loops(seed, patients, alpha):
    logits, targets = batch(seed, patients)
    pmfs, places = [pmf_by_hand(z) for z in logits.tolist()], [bin_by_hand(*t) for t in targets.tolist()]
    likelihood = ranking = 0.0
    for p, (survived, died) in zip(pmfs, places, strict=True):
        likelihood -= math.log(p[died] if died is not None else sum(p[survived:]))
    for i, (_, died) in enumerate(places):
        for j in range(patients):
            (ti, _), (tj, ej) = targets[i].tolist(), targets[j].tolist()
            if died is not None and (ti < tj or (ti == tj and not ej)):
                ranking += math.exp((sum(pmfs[j][: died + 1]) - sum(pmfs[i][: died + 1])) / 0.3)
    want = alpha * likelihood / patients + (1 - alpha) * ranking / patients**2
    assert float(deephit(logits, targets, EDGES, alpha=alpha, sigma=0.3)) == pytest.approx(want)
    assert float(deephit_likelihood(logits, targets, EDGES)) == pytest.approx(likelihood / patients)


def cox_by_hand(scores, targets, ties):
    """Return the mean over events of the negative log partial likelihood, by definition."""
    total, events = 0.0, sum(e for _, e in targets)
    for when in {t for t, e in targets if e}:
        risk = sum(math.exp(s) for s, (t, _) in zip(scores, targets, strict=True) if t >= when)
        dead = [s for s, (t, e) in zip(scores, targets, strict=True) if t == when and e]
        tied = sum(map(math.exp, dead))
        for r, s in enumerate(dead):
            total -= s - math.log(risk - (r / len(dead) * tied if ties == "efron" else 0))
    return total / events if events else 0.0


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), patients=st.integers(1, 15), ties=st.sampled_from(module.TIES))
def test_cox_is_the_partial_likelihood_by_definition(seed, patients, ties):
    scores, targets = batch(seed, patients, bins=1)
    found = float(cox(scores, targets, ties=ties))
    assert found == pytest.approx(cox_by_hand(scores[:, 0].tolist(), targets.tolist(), ties), abs=1e-12)
    shuffled = torch.randperm(patients, generator=torch.Generator().manual_seed(seed))
    assert float(cox(scores[shuffled], targets[shuffled], ties=ties)) == pytest.approx(found, abs=1e-12)


@pytest.mark.slow  # the import alone takes seconds
def test_cox_agrees_with_lifelines_at_its_optimum():
    """Lifelines maximises Efron's partial likelihood: ours has the same value there, and no gradient."""
    pytest.importorskip("lifelines")
    from lifelines import CoxPHFitter
    from lifelines.datasets import load_rossi

    table = load_rossi()
    fitted = CoxPHFitter().fit(table, "week", "arrest")
    x = torch.tensor(table[fitted.params_.index].to_numpy(dtype=float))
    beta = torch.tensor(fitted.params_.to_numpy(), requires_grad=True)
    targets = torch.tensor(table[["week", "arrest"]].to_numpy(dtype=float))
    loss = cox((x @ beta)[:, None], targets)
    assert -float(loss.detach()) * table["arrest"].sum() == pytest.approx(fitted.log_likelihood_, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, beta)
    assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("ties", module.TIES)
def test_cox_of_huge_scores_and_of_no_events_is_finite(ties):
    """exp(1e4) is no number; tied or not, nothing overflows."""
    targets = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 0.0]])
    scores = torch.tensor([[1e4], [-1e4], [5e3], [0.0]], requires_grad=True)
    loss = cox(scores, targets, ties=ties)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    none = cox(scores, torch.tensor([[1.0, 0.0]] * 4), ties=ties)
    assert float(none.detach()) == 0.0
    assert torch.autograd.grad(none, scores)[0].tolist() == [[0.0]] * 4
    one = cox(scores[:1], torch.tensor([[1.0, 1.0]]), ties=ties)  # one patient is compared with nobody
    assert float(one.detach()) == 0.0


@pytest.mark.parametrize(("name", "alpha"), [("logistic-hazard", 0.2), ("deephit", 1.0)])
def test_losses_that_decompose_are_means_over_patients(name, alpha):
    """A patient's gradient is the same alone and in company."""
    logits, targets = batch(3)
    loss = module.objective(name, EDGES, alpha=alpha)
    logits.requires_grad_()
    (whole,) = torch.autograd.grad(loss(logits, targets), logits)
    for i in range(len(logits)):
        (own,) = torch.autograd.grad(loss(logits[i : i + 1], targets[i : i + 1]), logits)
        torch.testing.assert_close(own[i] / len(logits), whole[i])


@pytest.mark.slow  # vmap's import takes seconds
@pytest.mark.parametrize(("name", "alpha"), [("logistic-hazard", 0.2), ("deephit", 1.0)])
def test_losses_that_decompose_have_per_example_gradients(name, alpha):
    """The gradient of the batch is the mean of gradients that vmap takes one patient at a time."""
    logits, targets = batch(3)
    loss = module.objective(name, EDGES, alpha=alpha)
    weight = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def one(w, z, t):
        return loss(z[None] @ w, t[None])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weight, logits, targets)
    whole = torch.func.grad(lambda w: loss(logits @ w, targets))(weight)
    torch.testing.assert_close(each.mean(0), whole)


def test_ranking_and_partial_likelihood_do_not_decompose():
    """Why they are said to be stratified by site: halves of a batch do not average to the whole."""
    logits, targets = batch(5, patients=16)
    for name in ("deephit", "cox"):
        loss = module.objective(name, EDGES)
        z = logits if name == "deephit" else logits[:, :1]
        halves = (loss(z[:8], targets[:8]) + loss(z[8:], targets[8:])) / 2
        assert abs(float(halves - loss(z, targets))) > 1e-3


def test_edges_of_bins_by_hand():
    """An event at an edge ends its bin, one at 0 is in the first; who is censored has survived whole bins only."""
    rows = [(0, 1), (1, 1), (1.5, 1), (4, 1), (4.5, 1), (0, 0), (1, 0), (2.4, 0), (4, 0), (9, 0)]
    index, event = discretise(torch.tensor(rows, dtype=torch.float64), EDGES)
    assert index.tolist() == [0, 0, 1, 2, 3, 0, 1, 1, 3, 3]
    assert event.tolist() == [True, True, True, True, False] + [False] * 5


@pytest.mark.parametrize("name", ["logistic-hazard", "deephit"])
def test_extreme_logits_give_finite_losses(name):
    logits = torch.tensor([[200.0, -200.0, 200.0]] * 3, requires_grad=True)
    targets = torch.tensor([[0.5, 1.0], [2.0, 1.0], [9.0, 0.0]])
    loss = module.objective(name, EDGES, alpha=1.0)(logits, targets)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_objectives_are_found_by_name_and_wrong_ones_are_refused():
    assert module.names()[0] == "logistic-hazard"
    assert [module.outputs(name, equal_edges(12, 6)) for name in module.names()] == [6, 6, 1]
    for arguments, code in [
        ({"name": "cux"}, "unknown-name"),
        ({"name": "cox", "ties": "exact"}, "unknown-name"),
        ({"name": "deephit", "edges": EDGES, "alpha": 1.5}, "value"),
        ({"name": "deephit", "edges": EDGES, "sigma": 0.0}, "value"),
        ({"name": "logistic-hazard", "edges": ()}, "value"),
        ({"name": "logistic-hazard", "edges": (0, 2, 2)}, "value"),
        ({"name": "logistic-hazard", "edges": (1, 2)}, "value"),
    ]:
        with pytest.raises(ConfigError) as raised:
            module.objective(**arguments)
        assert raised.value.code == code

"""Noise of the size that epsilon asks for; without noise what a plain learner finds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import anon_tables as tables
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from confrere.anonymise.dp_learner import SiteRows, chance, fit, noise_for
from confrere.anonymise.dp_table import _noisy, noisy_table, sensitivity
from confrere.errors import ConfigError
from confrere.privacy.accounting import epsilon as spent
from confrere.seeds import numpy_generator


def test_whole_number_noise_has_the_promised_ratio() -> None:
    """P(x) / P(x + 1) = e^scale: what one unit more in one count changes."""
    scale = 0.7
    drawn = _noisy(np.full(400_000, 50), scale, numpy_generator(0, "t")) - 50
    counts = np.array([(drawn == x).sum() for x in range(-3, 4)])
    assert np.log(counts[:3] / counts[1:4]) == pytest.approx(-scale, abs=0.05)
    assert np.log(counts[3:-1] / counts[4:]) == pytest.approx(scale, abs=0.05)
    assert counts[3] / len(drawn) == pytest.approx(math.tanh(scale / 2), abs=0.005)


def test_adding_a_unit_changes_all_counts_together_by_no_more_than_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every histogram is seen on its way to the noise, with and without one patient who has several records."""
    plan = tables.make(tmp_path)
    base = tables.rows(60, seed=0)
    more = [{**one, "p": "new", "i": "a;b;c;d;e"} for one in tables.rows(3, seed=1)]
    seen: list[np.ndarray] = []
    monkeypatch.setattr("confrere.anonymise.dp_table._noisy", lambda counts, *_: (seen.append(counts), counts)[1])
    totals = []
    for cells in (base, base + more):
        seen.clear()
        noisy_table(plan, tables.records(plan, cells), ["0", "1"], epsilon=1.0, most_items=3)
        totals.append(sum(int(counts.sum()) for counts in seen))
    assert sensitivity(plan, 3) == 1 + 3 + 3
    drawn = sum(min(3, len([i for i in one["i"].split(";") if i])) for one in base)
    assert totals[0] == 60 * 4 + drawn
    assert totals[1] - totals[0] == sensitivity(plan, 3), "three records of one patient count once"


def test_without_noise_the_made_up_table_has_the_counts_of_the_real_one(tmp_path: Path) -> None:
    plan = tables.make(tmp_path)
    known = tables.records(plan, tables.rows(3000, seed=0, most=3))
    made = noisy_table(plan, known, ["0", "1"], epsilon=math.inf)
    assert len(made) == len(known)
    for q in range(3):
        values = np.unique(known.codes[:, q])
        real, drawn = ([(some.codes[:, q] == value).mean() for value in values] for some in (known, made))
        assert drawn == pytest.approx(real, abs=0.04)
    assert np.mean([len(one) for one in made.items]) == pytest.approx(np.mean([len(i) for i in known.items]), abs=0.1)
    tiny = noisy_table(plan, known, ["0", "1"], epsilon=0.01)
    assert len(tiny) > 0
    assert noisy_table(plan, known, ["0", "1"], epsilon=0.01).kept == tiny.kept, "the seed decides"


@pytest.fixture(scope="module")
def sites() -> list[SiteRows]:
    rng = numpy_generator(0, "sites")
    x = rng.random((600, 3))
    y = (rng.random(600) < 1 / (1 + np.exp(-(6 * x[:, 0] - 3)))).astype(float)
    return [SiteRows(x[part], y[part], np.arange(len(y))[part]) for part in (slice(0, 200), slice(200, 600))]


def test_without_noise_the_learner_finds_the_optimum_of_pooled_logistic_regression(sites: list[SiteRows]) -> None:
    weights = fit(sites, rounds=4000, lr=3.0)
    x, y = np.vstack([s.features for s in sites]), np.concatenate([s.targets for s in sites])
    other = LogisticRegression(C=1e9, tol=1e-10, max_iter=10_000).fit(x, y)
    assert weights == pytest.approx([*other.coef_[0], other.intercept_[0]], abs=2e-3)
    assert chance(x, weights) == pytest.approx(other.predict_proba(x)[:, 1], abs=1e-3)


def test_a_patient_s_records_count_once_and_no_longer_than_the_clip(sites: list[SiteRows]) -> None:
    from confrere.anonymise.dp_learner import _clipped_sum

    x = np.hstack([sites[0].features * 50, np.ones((200, 1))])
    group = np.arange(200) // 4
    y = sites[0].targets
    whole = _clipped_sum(x, y, group, np.zeros(4), 1.0)
    for gone in (0, 17):
        stay = group != gone
        rest = _clipped_sum(x[stay], y[stay], np.unique(group[stay], return_inverse=True)[1], np.zeros(4), 1.0)
        assert np.linalg.norm(whole - rest) <= 1.0 + 1e-9
    free = _clipped_sum(x, y, group, np.zeros(4), math.inf)
    assert np.linalg.norm(free) > 2 * np.linalg.norm(whole)


def test_noise_costs_what_was_asked_for_and_has_its_size(sites: list[SiteRows]) -> None:
    sigma = noise_for(2.0, 1e-4, 50)
    assert spent(sigma, rounds=50, delta=1e-4, sampling="all") == pytest.approx(2.0, rel=2e-3)
    assert spent(sigma, rounds=50, delta=1e-4, sampling="all") <= 2.0
    assert noise_for(math.inf, 1e-4, 50) == 0
    plain = fit(sites, clip=1.0, rounds=1)
    off = np.concatenate([fit(sites, clip=1.0, rounds=1, sigma=3.0, seed=seed) - plain for seed in range(300)]) * 600
    assert off.std() == pytest.approx(3.0 * math.sqrt(2), rel=0.08), "each of two sites adds its own"


def test_what_cannot_be_is_refused(tmp_path: Path, sites: list[SiteRows]) -> None:
    plan = tables.make(tmp_path)
    known = tables.records(plan, tables.rows(20))
    for call, code in (
        (lambda: noisy_table(plan, known, ["0", "1"], epsilon=0.0), "value"),
        (lambda: noisy_table(replace(plan, keep=("lab",)), known, ["0", "1"], epsilon=1.0), "value"),
        (lambda: noise_for(-1.0, 1e-3, 10), "value"),
        (lambda: fit(sites, sigma=1.0), "privacy"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.code == code

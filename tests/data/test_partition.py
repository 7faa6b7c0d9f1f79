from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.data.partition import dirichlet, quantity
from confrere.errors import DataError

LABELS = {group: "abc"[group % 3] for group in range(300)}


@pytest.mark.parametrize("spread", [dirichlet, quantity])
@given(st.integers(2, 12), st.sampled_from([0.001, 0.1, 1.0, 1000.0]), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_every_group_has_one_site_and_no_site_is_empty(spread, n_sites, alpha, seed):
    site_of = spread(LABELS, n_sites=n_sites, alpha=alpha, seed=seed)
    assert site_of.keys() == LABELS.keys()
    assert set(site_of.values()) == set(range(n_sites))
    shuffled = dict(reversed(LABELS.items()))
    assert spread(shuffled, n_sites=n_sites, alpha=alpha, seed=seed) == site_of


def skew(site_of: dict[int, int]) -> float:
    """Mean share of the commonest class at a site; 1/3 when classes are mixed."""
    tables = [Counter(LABELS[g] for g, s in site_of.items() if s == site) for site in range(4)]
    return float(np.mean([max(table.values()) / table.total() for table in tables]))


def test_small_alpha_skews_classes_only_in_dirichlet():
    def mean(spread, alpha):
        return np.mean([skew(spread(LABELS, n_sites=4, alpha=alpha, seed=s)) for s in range(10)])

    assert mean(dirichlet, 0.1) > 0.65
    assert mean(dirichlet, 1000.0) < 0.40
    assert mean(quantity, 1000.0) < 0.45


def test_quantity_skews_numbers():
    counts = Counter(quantity(LABELS, n_sites=4, alpha=0.3, seed=0).values())
    assert max(counts.values()) > 2 * min(counts.values())


def test_too_few_patients():
    with pytest.raises(DataError, match="2 patients cannot be dealt to 3 sites"):
        quantity({1: "a", 2: "b"}, n_sites=3, alpha=1, seed=0)

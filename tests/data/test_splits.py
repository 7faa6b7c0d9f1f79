from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.data.splits import assign, check_groups, read_splits, write_splits
from confrere.errors import DataError

strata = st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 3))
members = st.dictionaries(
    st.integers(0, 10_000).map(str), st.lists(strata, min_size=1, max_size=6), min_size=1, max_size=60
)
shares = {"val": 0.15, "test": 0.2}


@given(members, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_group_once_every_site_trains_and_order_does_not_matter(groups, seed):
    result = assign(groups, **shares, seed=seed)
    assert result.keys() == groups.keys()
    shuffled = dict(reversed([(group, list(reversed(list(of)))) for group, of in groups.items()]))
    assert assign(shuffled, **shares, seed=seed) == result
    for site in {site for of in groups.values() for site, _ in of}:
        assert any(result[group] == 0 for group, of in groups.items() if site in {s for s, _ in of})


@given(st.integers(20, 200), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_proportions_are_close_for_each_class_of_each_site(n_groups, largest, seed):
    generator = np.random.default_rng(n_groups * 10 + largest)
    groups = {
        f"{site}{label}{i}": [(site, label)] * int(generator.integers(1, largest + 1))
        for site in "ab"
        for label in range(2)
        for i in range(n_groups)
    }
    result = assign(groups, **shares, seed=seed)
    counts: dict[tuple[str, int], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for group, of in groups.items():
        counts[of[0]][result[group]] += len(of)
    for count in counts.values():
        assert np.abs(count - count.sum() * np.array([0.65, 0.15, 0.2])).max() <= largest


def test_the_seed_matters():
    groups = {str(i): [("a", 0)] for i in range(50)}
    assert assign(groups, **shares, seed=0) != assign(groups, **shares, seed=1)


def test_a_class_with_one_patient_goes_to_train():
    groups = {str(i): [("a", 0)] for i in range(40)} | {"only": [("a", 1)] * 9}
    for seed in range(10):
        assert assign(groups, **shares, seed=seed)["only"] == 0


def test_patients_with_many_pictures_are_not_all_trained_on():
    groups = {f"{i}": [("a", 0)] * (1 + i % 4) for i in range(400)}
    result = assign(groups, **shares, seed=0)
    sizes = [np.mean([len(groups[g]) for g, split in result.items() if split == k]) for k in range(3)]
    assert max(sizes) - min(sizes) < 0.6


def test_zero_shares_are_kept():
    groups = {str(i): [("a", 0)] for i in range(20)}
    assert set(assign(groups, val=0, test=0.5, seed=0).values()) == {0, 2}
    assert set(assign(groups, val=0, test=0, seed=0).values()) == {0}


def test_stored_splits_round_trip_and_are_private(tmp_path):
    path = tmp_path / "new" / "splits.csv"
    rows = [("b", "22", 1), ("a", "11", 0), ("a", "33", 2)]
    write_splits(path, rows)
    assert read_splits(path, [("a", "11"), ("a", "33"), ("b", "22")]) == [0, 2, 1]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(DataError, match="1 new, 1 gone"):
        read_splits(path, [("a", "11"), ("a", "44"), ("b", "22")])


def test_stored_splits_with_another_word_are_refused(tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("site,sha256,split\na,11,holdout\n")
    with pytest.raises(DataError, match="line 2"):
        read_splits(path, [("a", "11")])


def test_a_patient_in_two_splits_is_refused():
    check_groups([1, 1, 2], [0, 0, 2], where="x")
    with pytest.raises(DataError, match="1 patients are in more than one"):
        check_groups([1, 1, 2], [0, 1, 2], where="x")

"""Friedman and Nemenyi against published tables, SciPy and a worked example."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from confrere.errors import DataError
from confrere.metrics.ranks import critical_difference, groups, rank_test

# Demsar, JMLR 7 (2006), table 5(a): critical values of the two-tailed Nemenyi test, alpha 0.05 and 0.10.
Q05 = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}
Q10 = {2: 1.645, 3: 2.052, 4: 2.291, 5: 2.459, 6: 2.589, 7: 2.693, 8: 2.780, 9: 2.855, 10: 2.920}


@pytest.mark.parametrize(("level", "table"), [(0.95, Q05), (0.90, Q10)])
def test_the_critical_difference_is_demsars(level: float, table: dict[int, float]) -> None:
    for k, q in table.items():
        for blocks in (10, 14):
            expected = q * (k * (k + 1) / (6 * blocks)) ** 0.5
            assert critical_difference(k, blocks, level=level) == pytest.approx(expected, abs=6e-4 * expected)


def test_demsars_example() -> None:
    """Section 3.2.2: four versions of C4.5 on 14 data sets; mean ranks 3.143, 2.000, 2.893, 1.964; CD 1.12 at 0.10."""
    scores = np.array(
        [
            [0.763, 0.768, 0.771, 0.798],
            [0.599, 0.591, 0.590, 0.569],
            [0.954, 0.971, 0.968, 0.967],
            [0.628, 0.661, 0.654, 0.657],
            [0.882, 0.888, 0.886, 0.898],
            [0.936, 0.931, 0.916, 0.931],
            [0.661, 0.668, 0.609, 0.685],
            [0.583, 0.583, 0.563, 0.625],
            [0.775, 0.838, 0.866, 0.875],
            [1.000, 1.000, 1.000, 1.000],
            [0.940, 0.962, 0.965, 0.962],
            [0.619, 0.666, 0.614, 0.669],
            [0.972, 0.981, 0.9751, 0.975],
            [0.957, 0.978, 0.946, 0.970],
        ]
    )
    found = rank_test(scores, level=0.90)
    assert found["ranks"] == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=6e-4)
    assert found["difference"] == pytest.approx(1.12, abs=0.005)  # 2.291 sqrt(4 * 5 / (6 * 14))
    assert found["shown"]
    statistic, p = stats.friedmanchisquare(*scores.T)
    assert (found["statistic"], found["p"]) == (pytest.approx(statistic), pytest.approx(p))
    assert found["groups"] == [[3, 1, 2], [2, 0]]  # C4.5 differs from +m and +m+cf, not from +cf


def test_higher_is_better_and_ties_share_a_rank() -> None:
    found = rank_test(np.array([[0.9, 0.5, 0.5], [0.8, 0.7, 0.1]]))
    assert found["ranks"] == [1.0, 2.25, 2.75]


def test_without_a_difference_all_are_one_group() -> None:
    found = rank_test(np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.1, 0.3]]))
    assert not found["shown"]
    assert len(found["groups"]) == 1
    equal = rank_test(np.full((5, 3), 0.5))
    assert (equal["p"], equal["shown"], equal["ranks"]) == (1.0, False, [2.0, 2.0, 2.0])


def test_groups_are_the_largest_sets_and_a_method_may_stand_alone() -> None:
    assert groups([1.0, 3.0, 3.5], 1.0) == [[0], [1, 2]]
    assert groups([3.2, 1.0, 3.0, 1.5], 1.6) == [[1, 3], [3, 2], [2, 0]]
    assert groups([1.0, 1.2, 1.4], 5.0) == [[0, 1, 2]]
    assert groups([1.0, 2.0], 1.0) == [[0], [1]], "a distance of the critical difference is a difference"


@pytest.mark.parametrize("shape", [(1, 3), (5, 2)])
def test_too_little_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="no ranks"):
        rank_test(np.zeros(shape))
    with pytest.raises(DataError, match="no ranks"):
        rank_test(np.array([[1.0, 2.0, np.nan], [1.0, 2.0, 3.0]]))

"""Do methods differ when they are ranked within many blocks? Friedman's test and Nemenyi's critical difference.

Shapes: N blocks (a hospital with a seed), k methods. Rank 1 is the best score of a block; ties share the mean rank.

References:
    Friedman, "The Use of Ranks to Avoid the Assumption of Normality", JASA 32 (1937).
    Nemenyi, "Distribution-free Multiple Comparisons", PhD thesis, Princeton (1963).
    Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7 (2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from confrere.errors import DataError
from confrere.metrics.bootstrap import LEVEL, Floats

ASSUMPTION = (
    "Friedman's and Nemenyi's tests take the blocks (one hospital with one seed) for independent. Seeds of one "
    "hospital share its patients, and hospitals train together, so this diagram is more confident than it should be: "
    "it orders the methods, and the paired tests over patients decide."
)


def rank_test(scores_Nk: Floats, *, level: float = LEVEL) -> dict[str, Any]:
    """Return mean ranks, Friedman's test, the critical difference and the groups within it.

    Args:
        scores_Nk: higher is better, no NaN; N >= 2 blocks, k >= 3 methods.
        level: confidence of test and critical difference.

    Returns:
        ``ranks`` (k mean ranks, 1 is best), ``statistic`` (chi-squared with k - 1 degrees of freedom), ``p``,
        ``difference`` (two mean ranks that differ by less show no difference), ``shown`` (whether Friedman's
        test rejects that all are equal; without it no difference is shown), ``groups`` (indices of methods that
        the test does not tell apart, largest sets, best first), ``blocks``.

    Raises:
        DataError: too few blocks or methods, or an undefined score.
    """
    from scipy import stats

    if scores_Nk.ndim != 2 or scores_Nk.shape[0] < 2 or scores_Nk.shape[1] < 3 or np.isnan(scores_Nk).any():
        raise DataError(
            f"no ranks from scores of shape {scores_Nk.shape}",
            where="rank test",
            fix="give at least 2 blocks and 3 methods, and leave out blocks with an undefined score",
            code="metric-input",
        )
    blocks, k = scores_Nk.shape
    ranks_Nk = np.apply_along_axis(stats.rankdata, 1, -scores_Nk)
    ranks = ranks_Nk.mean(axis=0)
    if (scores_Nk == scores_Nk[:, :1]).all():
        statistic, p = 0.0, 1.0  # all equal everywhere: SciPy divides by zero
    else:
        statistic, p = map(float, stats.friedmanchisquare(*scores_Nk.T))
    shown = p < 1 - level
    difference = critical_difference(k, blocks, level=level)
    found = groups(ranks.tolist(), difference) if shown else [list(np.argsort(ranks, kind="stable"))]
    return {
        "ranks": [float(rank) for rank in ranks],
        "statistic": statistic,
        "p": p,
        "difference": difference,
        "shown": shown,
        "groups": [[int(i) for i in group] for group in found],
        "blocks": blocks,
    }


def critical_difference(k: int, blocks: int, *, level: float = LEVEL) -> float:
    """Return Nemenyi's critical difference of mean ranks: ``q sqrt(k (k + 1) / (6 N))``.

    ``q`` is the quantile of the studentised range of k values with infinite degrees of freedom, divided by
    the square root of 2 (2.728 for k = 5 and 95 %: Demsar, table 5a).
    """
    from scipy import stats

    q = float(stats.studentized_range.ppf(level, k, np.inf)) / 2**0.5
    return q * float(np.sqrt(k * (k + 1) / (6 * blocks)))


def groups(ranks: Sequence[float], difference: float) -> list[list[int]]:
    """Return the largest sets of methods whose mean ranks lie within ``difference``, best first.

    A method that differs from all others stands alone.

    >>> groups([1.0, 1.5, 3.0, 3.2], 1.6)
    [[0, 1], [1, 2], [2, 3]]
    """
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
    found: list[list[int]] = []
    last = -1
    for start, i in enumerate(order):
        end = max(j for j in range(start, len(order)) if ranks[order[j]] - ranks[i] < difference)
        if end > last:
            found.append(order[start : end + 1])
            last = end
    return found

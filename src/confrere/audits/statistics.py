"""Strengths of a membership attack with intervals that respect few members. Higher scores: more like a member.

A unit is a patient: ``inside`` (M,) and ``outside`` (N,) hold one score each, so that units are independent.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, ndtri

from confrere.audits.audit import LEVEL, Interval
from confrere.seeds import numpy_generator

Floats = NDArray[np.float64]
Z = float(ndtri(0.5 + LEVEL / 2))
TAIL = (1 - LEVEL) / 2


def auc(inside: Floats, outside: Floats) -> Interval:
    """Return P(member's score > other's) + P(equal) / 2, with the score interval of Newcombe (2006, method 5).

    ``(a - t)^2 = z^2 t (1 - t) (1 + (k - 1) ((1 - t) / (2 - t) + t / (1 + t))) / (M N)``, ``k = (M + N) / 2``, solved
    for t: Hanley and McNeil's variance taken at the limit itself, as Wilson's interval does for a proportion, so that
    it neither leaves [0, 1] nor collapses at 0 or 1 where members are few.
    """
    m, n = len(inside), len(outside)
    if not m or not n:
        return Interval()
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, "left") + np.searchsorted(ordered, inside, "right")
    area = float(below.sum() / (2 * m * n))
    half = (m + n) / 2 - 1

    def excess(t: float) -> float:
        spread = t * (1 - t) * (1 + half * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
        return (area - t) ** 2 - Z * Z * spread

    tiny = 1e-12  # at 0 and 1 themselves the equation holds, too
    low = float(brentq(excess, 0.0, area - tiny)) if area > 0 else 0.0
    high = float(brentq(excess, area + tiny, 1.0)) if area < 1 else 1.0
    return Interval(area, low, high)


def proportion(successes: int, trials: int) -> Interval:
    """Return a proportion with the interval of Clopper and Pearson."""
    if not trials:
        return Interval()
    low = float(betaincinv(successes, trials - successes + 1, TAIL)) if successes else 0.0
    high = float(betaincinv(successes + 1, trials - successes, 1 - TAIL)) if successes < trials else 1.0
    return Interval(successes / trials, low, high)


def tpr_at(inside: Floats, outside: Floats, fpr: float) -> tuple[Interval, Interval]:
    """Return the true-positive rate at the threshold that at most ``fpr`` of the others exceed, and its true FPR.

    The threshold is an order statistic of the others, so that given it the members are plain trials (Clopper-Pearson)
    and the false-positive rate of new others has a Beta distribution, whatever their scores are. Both are undefined
    with fewer than ``1 / fpr`` others: such a rate cannot be seen.
    """
    m, n = len(inside), len(outside)
    allowed = math.floor(fpr * n + 1e-9)
    if not m or not allowed:
        return Interval(), Interval()
    threshold = np.sort(outside)[n - allowed - 1]  # `allowed` others, or fewer where some are equal, lie above it
    above = int((outside > threshold).sum())
    true = proportion(int((inside > threshold).sum()), m)
    false = (float(betaincinv(above + 1, n - above, q)) for q in (TAIL, 1 - TAIL))
    return true, Interval(above / n, *false)


def advantage(inside: Floats, outside: Floats, seed: int, *address: str | int) -> Interval:
    """Return the largest ``TPR - FPR`` over thresholds, each chosen on one half of the patients and tried on the other.

    Chosen and tried on the same patients it would be above zero for any scores. Interval of the difference: Newcombe's
    hybrid of two Wilson intervals.
    """
    m, n = len(inside), len(outside)
    if m < 4 or n < 4:
        return Interval()
    rng = numpy_generator(seed, "audit", "halves", *address)
    parts = [(rng.permutation(m) % 2), (rng.permutation(n) % 2)]
    true = false = 0
    for half in (0, 1):
        threshold = best_threshold(inside[parts[0] != half], outside[parts[1] != half])
        true += int((inside[parts[0] == half] > threshold).sum())
        false += int((outside[parts[1] == half] > threshold).sum())
    return difference(true, m, false, n)


def best_threshold(inside: Floats, outside: Floats) -> float:
    """Return the score above which members outnumber others most, by rate; the lowest of equals."""
    values = np.unique(np.concatenate([inside, outside]))
    gain = np.searchsorted(np.sort(outside), values, "right") / len(outside)
    gain = gain - np.searchsorted(np.sort(inside), values, "right") / len(inside)
    return float(values[int(gain.argmax())])


def difference(true: int, m: int, false: int, n: int) -> Interval:
    """Return ``true / m - false / n`` with Newcombe's (1998, method 10) interval."""
    a, b = wilson(true, m), wilson(false, n)
    p, q = true / m, false / n
    low = p - q - math.hypot(p - a[0], b[1] - q)
    return Interval(p - q, low, p - q + math.hypot(a[1] - p, q - b[0]))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the two ends of Wilson's interval of a proportion."""
    p, square = successes / trials, Z * Z / trials
    centre, half = (p + square / 2) / (1 + square), Z * math.sqrt(p * (1 - p) / trials + square / (4 * trials))
    return centre - half / (1 + square), centre + half / (1 + square)


def tpr_bound(epsilon: float, delta: float, steps: int, fpr: float) -> float:
    """Return the most true positives that (epsilon, delta) allows at a false-positive rate, so many ``steps`` apart.

    ``min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR))`` for neighbours (Kairouz et al., 2015), and the same of that
    for data two steps apart (Dong, Roth and Su, 2022, group privacy).
    """
    return float(_most(epsilon, delta, steps, np.array([fpr]))[0])


def auc_bound(epsilon: float, delta: float, steps: int) -> float:
    """Return the area under :func:`tpr_bound`, in steps of 1/4096, rounded up."""
    return float(_most(epsilon, delta, steps, np.linspace(0, 1, 4097)[1:]).mean())


def advantage_bound(epsilon: float, delta: float, steps: int) -> float:
    """Return the most ``TPR - FPR`` that (epsilon, delta) allows over one or two ``steps``.

    ``(e^eps - 1 + 2 delta) / (e^eps + 1)``, and ``1 - e^-eps (1 - 2 delta)``: where the last step begins at the
    corner of :func:`tpr_bound`.
    """
    fpr = (1 - delta) / (1 + math.exp(min(epsilon, 700)))
    for _ in range(steps - 1):
        fpr = max(0.0, (fpr - delta) * math.exp(-epsilon))
    return tpr_bound(epsilon, delta, steps, fpr) - fpr


def _most(epsilon: float, delta: float, steps: int, rates: Floats) -> Floats:
    if epsilon > 700:
        return np.ones_like(rates)
    for _ in range(steps):
        more = np.minimum(math.exp(epsilon) * rates + delta, 1 - math.exp(-epsilon) * (1 - delta - rates))
        rates = more.clip(0, 1)
    return rates

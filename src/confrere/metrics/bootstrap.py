"""Resampling of patients, and intervals that stay honest at small sites.

Images of one patient resemble each other, so patients are drawn, never images. Shapes: N images, P patients,
R resamples. A resample is a row of patient weights (how often each was drawn), so that every statistic of all
resamples is one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri, stdtr, stdtrit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Estimate = dict[str, float | None]

LEVEL = 0.95
# With five patients even an exact sign test that finds all on one side has p = 2 / 2^5 > 0.05.
ENOUGH_PATIENTS = 6


def draw(patients: int, generator: np.random.Generator, resamples: int) -> Floats:
    """Return patient weights (1 + R, P): row 0 is the sample itself, the rest are drawn from it."""
    own = np.ones((1, patients))
    if not patients:
        return np.ones((1 + resamples, 0))
    picks = generator.integers(patients, size=(resamples, patients))
    picks += patients * np.arange(resamples)[:, None]
    counts = np.bincount(picks.ravel(), minlength=resamples * patients)
    return np.concatenate([own, counts.reshape(resamples, patients).astype(np.float64)])


def per_patient(patient_N: Ints, column_N: Ints, shape: tuple[int, int], values_N: Floats | None = None) -> Floats:
    """Return sums (P, columns) of ``values_N`` (default: ones) by patient and column."""
    cells = patient_N * shape[1] + column_N
    return np.bincount(cells, weights=values_N, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def ratio(above: Floats, below: Floats) -> Floats:
    """Return ``above / below``, NaN where ``below`` is zero."""
    above, below = np.broadcast_arrays(above, below)
    quotient: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return quotient


def mean_defined(values: Floats) -> Floats:
    """Return the mean over the last axis of the entries that are not NaN, NaN if there are none."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1).astype(np.float64))


def effective_patients(images_PK: Floats) -> float:
    """Return how many patients an average over classes rests on: few when one class has few.

    One more than Welch and Satterthwaite's degrees of freedom of a sum of class means of equal variance. A
    class with a single patient says nothing about its variance and counts as one degree of freedom.

    Args:
        images_PK: images by patient and class; classes without images do not count.

    References:
        Welch, "The Generalization of 'Student's' Problem", Biometrika 34 (1947).
    """
    n = (images_PK > 0).sum(axis=0)
    n = n[n > 0].astype(np.float64)
    if not n.size:
        return 0.0
    return 1.0 + float((1 / n).sum() ** 2 / (1 / (n**2 * np.maximum(n - 1, 1))).sum())


def reach(values: Sequence[float]) -> float:
    """Return how far the 95 % Student t interval of a mean reaches on either side; at least two values."""
    n = len(values)
    return float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / n**0.5)


def tail(patients: float) -> float:
    """Return the share of resamples cut at each end, below 0.025 when patients are few.

    The plain percentile interval is too short by about sqrt((P-1)/P) z/t; cutting further out mends it.

    References:
        Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015).
    """
    t = -stdtrit(patients - 1, (1 - LEVEL) / 2)
    return float(ndtr(-t * np.sqrt(patients / (patients - 1))))


def widened_p(p: float, patients: float) -> float:
    """Return the p-value that belongs to :func:`tail`: below 0.05 when the interval just excludes zero."""
    return float(min(1.0, 2 * stdtr(patients - 1, ndtri(p / 2) / np.sqrt(patients / (patients - 1)))))


def is_flat(samples: Floats) -> bool:
    """Return whether all defined resamples agree, which says nothing about how sure the value is."""
    defined = samples[~np.isnan(samples)]
    return bool(defined.size) and float(np.ptp(defined)) < 1e-12


def percentile(
    value: float, samples_R: Floats, patients: int, *, effective: float | None = None, biased: bool = False
) -> Estimate:
    """Return ``value`` with its 95 % interval from resamples; None for what cannot be said.

    No interval is given for fewer than ``ENOUGH_PATIENTS`` patients, when all resamples agree, or when the
    value is undefined in half of them. Resamples in which it is undefined do not count.

    Args:
        value: the statistic of the sample, NaN if undefined.
        samples_R: the statistic of each resample, NaN where undefined.
        patients: how many patients there are.
        effective: how many the value rests on, see :func:`effective_patients`; default: all.
        biased: the value is biased and resampling repeats the bias (as for ECE, which chance alone raises):
            centre on the value less the bias, as wide on both sides as the upper percentile is off the value.
    """
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    defined = samples_R[~np.isnan(samples_R)]
    if patients < ENOUGH_PATIENTS or 2 * defined.size <= samples_R.size or is_flat(defined):
        return {"value": float(value), "low": None, "high": None}
    cut = tail(patients if effective is None else effective)
    low, high = np.quantile(defined, [cut, 1 - cut])
    if biased:
        centre, half = 2 * value - defined.mean(), high - value
        low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def exact(value: float, images_P: Floats) -> Estimate:
    """Return a proportion with its Clopper-Pearson 95 % interval, counting patients instead of images.

    Serves where resampling cannot: very few patients, or all images right (or wrong). Patients with unequal
    numbers of images count as ``(sum n)^2 / sum n^2`` patients (Kish), so that the interval errs on the
    wide side.
    """
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    n = float(images_P.sum() ** 2 / np.square(images_P).sum())
    hits, misses = value * n, (1 - value) * n
    low = 0.0 if value <= 0 else float(betaincinv(hits, misses + 1, (1 - LEVEL) / 2))
    high = 1.0 if value >= 1 else float(betaincinv(hits + 1, misses, (1 + LEVEL) / 2))
    return {"value": float(value), "low": low, "high": high}

"""Metrics of several findings an image, with 95 % intervals over patients.

Shapes: N images, K findings, P patients, R resamples (row 0 is the sample). A truth is 1 (there), 0 (not there) or -1
(nobody said): such images are left out of that finding's numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from confrere.errors import DataError
from confrere.metrics.bootstrap import (
    ENOUGH_PATIENTS,
    Estimate,
    Floats,
    Ints,
    draw,
    effective_patients,
    mean_defined,
    per_patient,
    percentile,
    ratio,
)

Measure = Callable[[Floats, np.ndarray, Floats], Floats]
"""``(probabilities (n,), truth (n,) bool, weights of images (R, n)) -> (R,)``, NaN where it is undefined."""


def auroc(chance: Floats, true: np.ndarray, weights: Floats) -> Floats:
    """Return P(an image with the finding scores higher) + half P(equal)."""
    rest = np.flatnonzero(~true)
    rest = rest[np.argsort(chance[rest], kind="stable")]
    # Cumulative weight of the others in ascending order: what lies below a score is a look-up.
    below = np.zeros((len(weights), len(rest) + 1))
    np.cumsum(weights[:, rest], axis=1, out=below[:, 1:])
    ends = [below[:, np.searchsorted(chance[rest], chance[true], side=side)] for side in ("left", "right")]
    wins = (weights[:, true] * (ends[0] + ends[1])).sum(1) / 2
    return ratio(wins, weights[:, true].sum(1) * below[:, -1])


def average_precision(chance: Floats, true: np.ndarray, weights: Floats) -> Floats:
    """Return the sum over scores of precision times the step in recall, as scikit-learn does."""
    order = np.argsort(-chance, kind="stable")
    last = np.flatnonzero(np.diff(chance[order], append=-1.0) != 0)  # of images that score the same
    right = (weights * true)[:, order].cumsum(1)[:, last]
    every = weights[:, order].cumsum(1)[:, last]
    precision = np.nan_to_num(ratio(right, every))
    return ratio((np.diff(right, axis=1, prepend=0.0) * precision).sum(1), right[:, -1] if len(last) else right.sum(1))


def f1(chance: Floats, true: np.ndarray, weights: Floats) -> Floats:
    """Return F1 of what is at least 0.5 probable; undefined without an image that has the finding."""
    said = chance >= 0.5
    both, total = weights @ (said & true), weights @ (said.astype(float) + true)
    return np.where(weights @ true > 0, ratio(2 * both, total), np.nan)


def brier(chance: Floats, true: np.ndarray, weights: Floats) -> Floats:
    """Return the mean squared gap between probability and truth."""
    return ratio(weights @ np.square(chance - true), weights.sum(1))


MEASURES: dict[str, Measure] = {"auroc": auroc, "average_precision": average_precision, "f1": f1, "brier": brier}


def of_findings(measure: Measure, chances: Floats, truth: Ints, patient_N: Ints, weights: Floats) -> Floats:
    """Return a measure (R, K) of each finding.

    Args:
        measure: one of :data:`MEASURES`.
        chances: (N, K).
        truth: (N, K).
        patient_N: of each image, 0..P-1.
        weights: (R, P), how often each patient was drawn.
    """
    found = np.full((len(weights), truth.shape[1]), np.nan)
    for k in range(truth.shape[1]):
        known = np.flatnonzero(truth[:, k] >= 0)
        if len(known):
            found[:, k] = measure(chances[known, k], truth[known, k] == 1, weights[:, patient_N[known]])
    return found


def values_of_patients(truth: Ints, patient_N: Ints, patients: int) -> Floats:
    """Return how many images with and without each finding a patient has (P, 2 K): what an AUROC rests on."""
    column = np.arange(truth.shape[1])
    with_, without = (truth == 1), (truth == 0)
    row, k = np.nonzero(with_ | without)
    both = with_.any(0) & without.any(0)
    told = both[k]
    place = column[k] * 2 + with_[row, k]
    return per_patient(patient_N[row[told]], place[told], (patients, 2 * truth.shape[1]))


def evaluate_findings(
    chances: Floats,
    truth: Ints,
    groups: Ints,
    *,
    classes: Sequence[str],
    generator: np.random.Generator,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Return every metric with its 95 % interval from resampled patients, ready for JSON.

    Args:
        chances: (N, K) probabilities.
        truth: (N, K) of 1, 0, -1.
        groups: (N,) patient of each image.
        classes: K names.
        generator: source of the resamples.
        resamples: R.

    Returns:
        ``n``, ``patients``; ``auroc``, ``average_precision``, ``f1``, ``brier``, each a mean over the findings for
        which it is defined, ``{"value", "low", "high"}`` in 0..1; ``by_class``: AUROC by finding; ``prevalence`` by
        finding; ``absent``: findings whose AUROC is undefined; ``notes``.

    Raises:
        DataError: shapes do not fit, or values are out of range.
    """
    check_findings(chances, truth, groups)
    patient_N = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    weights = draw(int(patient_N.max(initial=-1)) + 1, generator, resamples)
    P = weights.shape[1]
    effective = effective_patients(values_of_patients(truth, patient_N, P)) or None
    samples = {name: of_findings(one, chances, truth, patient_N, weights) for name, one in MEASURES.items()}
    out: dict[str, Any] = {"n": len(truth), "patients": P}
    for name, found in samples.items():
        mean = mean_defined(found)
        out[name] = percentile(mean[0], mean[1:], P, effective=effective if name != "brier" else None)
    out["by_class"] = {name: _of_one(samples["auroc"][:, k], truth[:, k], patient_N) for k, name in enumerate(classes)}
    told, there = (truth >= 0).sum(0), (truth == 1).sum(0)
    out["prevalence"] = {name: float(there[k] / told[k]) if told[k] else None for k, name in enumerate(classes)}
    out["absent"] = [name for k, name in enumerate(classes) if np.isnan(samples["auroc"][0, k])]
    out["notes"] = _notes(out, int((truth < 0).sum()))
    return out


def check_findings(chances: Floats, truth: Ints, groups: Ints) -> None:
    """Raise DataError unless probabilities (N, K), truths (N, K) and groups (N,) fit and are in range."""
    fits = chances.ndim == 2 and chances.shape == truth.shape and groups.shape == truth.shape[:1]
    inside = fits and bool((np.isfinite(chances) & (chances >= 0) & (chances <= 1)).all())
    if not inside or not np.isin(truth, (-1, 0, 1)).all():
        what, fix = (
            "probabilities and truths of findings do not fit",
            "give (N, K) in 0..1, (N, K) of 1, 0, -1, and (N,)",
        )
        raise DataError(what, where="evaluation", fix=fix, code="metric-input")


def _of_one(samples: Floats, truth_N: Ints, patient_N: Ints) -> Estimate:
    """Return one finding's AUROC; of no more patients than have it, or have it not."""
    few = min(len(np.unique(patient_N[truth_N == value])) for value in (0, 1))
    return percentile(samples[0], samples[1:], few)


def _notes(out: dict[str, Any], unknown: int) -> list[str]:
    if not out["n"]:
        return ["There are no test images, so nothing can be measured."]
    notes = []
    if out["absent"]:
        notes.append(
            f"All test images with or all without {', '.join(out['absent'])}: averages run over the other findings."
        )
    if unknown:
        notes.append(f"Findings of test images that are not known: {unknown}; they count nowhere.")
    if out["patients"] < ENOUGH_PATIENTS:
        notes.append(f"Fewer than {ENOUGH_PATIENTS} test patients: no intervals.")
    return notes

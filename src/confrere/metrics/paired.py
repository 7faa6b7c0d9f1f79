"""Whether model A is better than model B on the same patients.

Shapes: N images, K classes, P patients (of all seeds together), S seeds, R resamples (row 0 is the sample).

Each resample draws patients with replacement, and the drawn patients serve both models and all seeds: patients
that recur in several seeds' test sets are the same people, and drawing them anew for each seed would count them as
new evidence. A class that vanishes from a resample is left out of its averages. Seeds are too few to be resampled:
their spread enters by Student's t, joined with the patients' interval as the error of a sum of two independent
parts (Zou and Donner, "Construction of Confidence Limits About Effect Measures", Statistics in Medicine 27, 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from confrere.errors import DataError
from confrere.metrics.bootstrap import (
    ENOUGH_PATIENTS,
    LEVEL,
    Floats,
    Ints,
    draw,
    effective_patients,
    mean_defined,
    per_patient,
    ratio,
    tail,
    widened_p,
)
from confrere.metrics.classification import check
from confrere.metrics.findings import auroc, of_findings, values_of_patients
from confrere.metrics.survival import harrell

Run = tuple[Floats, Ints, Ints]
"""(probabilities (N, K), labels (N,), groups (N,)); (values (N,) in 0..1, zeros (N,), groups (N,)), e.g. Dice; or
(risks (N,), time and event (N, 2), groups (N,)), of which Harrell's concordance is compared; or (probabilities (N, K),
findings (N, K), groups (N,)), of which the mean AUROC is."""
FEW_PATIENTS = 20
OTHERS = {"local": "training alone", "pooled": "training on the pooled data of all hospitals"}


def paired_gain(
    runs_a: Sequence[Run],
    runs_b: Sequence[Run],
    *,
    generator: np.random.Generator,
    resamples: int = 2000,
    metric: str = "balanced_accuracy",
) -> dict[str, Any]:
    """Return the gain of A over B in balanced accuracy or mean value, its 95 % interval and two-sided p-value.

    Args:
        runs_a: per seed, see :data:`Run`; a patient keeps one number over all seeds.
        runs_b: the same for B: same seeds in the same order, same test images in the same order.
        generator: source of the resamples.
        resamples: R.
        metric: name of what is compared.

    Returns:
        ``metric``, ``gain`` (mean over seeds, in -1..1), ``low``, ``high``, ``p``, ``patients``, ``seeds``,
        ``note``. Undefined entries are None and ``note`` says why. Where the models differ on fewer than six
        patients, no exact test could exclude a zero gain; p is then at least that of the exact sign test. The
        interval is widened to contain zero wherever p >= 0.05.

    Raises:
        DataError: A and B were not tested on the same images.
    """
    pairs = _paired(runs_a, runs_b)
    seeds = len(pairs)
    everyone = np.unique(np.concatenate([np.zeros(0, np.int64), *(a[2] for a, _ in pairs)]))
    P = len(everyone)
    weights = draw(P, generator, resamples)
    gains_RS = np.full((len(weights), seeds), np.nan)
    differ_P, images = np.zeros(P, bool), []
    for s, (a, b) in enumerate(pairs):
        gains_RS[:, s], differs, images_PK = _gains(a, b, np.searchsorted(everyone, a[2]), weights)
        differ_P |= differs
        images.append(images_PK)
    samples = mean_defined(gains_RS)
    out: dict[str, Any] = {"metric": metric, "gain": None, "low": None, "high": None, "p": None}
    out |= {"patients": P, "seeds": seeds, "note": None}
    if np.isnan(samples[0]):
        return out | {"note": "there are no test images"}
    out["gain"] = float(samples[0])
    if P < ENOUGH_PATIENTS:
        return out | {"note": f"fewer than {ENOUGH_PATIENTS} test patients allow no interval"}
    by_seed = gains_RS[0][~np.isnan(gains_RS[0])]
    return out | inference(samples, by_seed, effective_patients(np.sum(images, axis=0)), int(differ_P.sum()))


def _gains(a: Run, b: Run, patient_N: Ints, weights: Floats) -> tuple[Floats, np.ndarray, Floats]:
    """Return one seed's gain per resample (R,), on whom the models differ (P,), and images (P, K)."""
    if is_ranked(a):
        (one, ranks_a), (two, ranks_b) = (concordance(run, patient_N, weights) for run in (a, b))
        differs: np.ndarray = (ranks_a != ranks_b).any(axis=1)
        return one - two, differs, events_of_patients(a, patient_N, weights.shape[1])
    labels, K, P = a[1], classes_of(a), weights.shape[1]
    hits_a, hits_b = (per_patient(patient_N, labels, (P, K), hits(run)) for run in (a, b))
    images_PK = per_patient(patient_N, labels, (P, K))
    gain_RK = ratio(weights @ (hits_a - hits_b), weights @ images_PK)
    return mean_defined(gain_RK), (hits_a != hits_b).any(axis=1), images_PK


def is_ranked(run: Run) -> bool:
    """Return whether the order of a run's predictions is what counts: of risks, or of probabilities of findings."""
    return run[1].ndim == 2


def events_of_patients(run: Run, patient_N: Ints, patients: int) -> Floats:
    """Return how many rows with and without an event, or each finding, a patient has (P, ...)."""
    if run[0].ndim == 2:
        return values_of_patients(run[1], patient_N, patients)
    return per_patient(patient_N, (run[1][:, 1] > 0).astype(np.int64), (patients, 2))


def concordance(run: Run, patient_N: Ints, weights: Floats) -> tuple[Floats, Floats]:
    """Return Harrell's concordance or the mean AUROC (R,), and ranks of each patient's predictions, summed (P, ...)."""
    risk, targets = run[0], run[1]
    if risk.ndim == 2:
        samples = mean_defined(of_findings(auroc, risk, targets, patient_N, weights))
        places = np.stack([np.unique(column, return_inverse=True)[1] for column in risk.T], axis=1).astype(np.float64)
        return samples, np.stack([np.bincount(patient_N, column, weights.shape[1]) for column in places.T], axis=1)
    samples = harrell(targets[:, 0].astype(np.float64), targets[:, 1] > 0, risk, weights[:, patient_N])
    ranks = np.unique(risk, return_inverse=True)[1].astype(np.float64)
    return samples, per_patient(patient_N, np.zeros_like(patient_N), (weights.shape[1], 1), ranks)


def classes_of(run: Run) -> int:
    """Return over how many classes a run's scores are averaged: one where each image has a value of its own."""
    return 1 if run[0].ndim == 1 else run[0].shape[1]


def hits(run: Run) -> Floats:
    """Return each image's part (N,) of its class's score, in 0..1: whether it is right, or its own value."""
    found: Floats = run[0] if run[0].ndim == 1 else (run[0].argmax(axis=1) == run[1]).astype(np.float64)
    return found


def inference(samples: Floats, by_seed: Floats, patients: float, differing: int) -> dict[str, Any]:
    """Return ``low``, ``high``, ``p`` and ``note`` from the sample (row 0), its resamples and the seeds' gains."""
    gain, drawn = samples[0], samples[1:][~np.isnan(samples[1:])]
    if not differing:
        return {"low": 0.0, "high": 0.0, "p": 1.0, "note": "both models score the same on the same test images"}
    cut = tail(patients)
    low, high = np.quantile(drawn, [cut, 1 - cut])
    # Ties with zero count on both sides; + 1 because the sample itself is one possible draw.
    side = min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1
    p = widened_p(min(1.0, 2 * float(side) / (len(drawn) + 1)), patients)
    if len(by_seed) > 1:
        low, high, p = _with_seeds(gain, (low, high, p), by_seed, float(drawn.std()), patients)
    note = None
    if differing < ENOUGH_PATIENTS:
        p = max(p, 2.0 ** (1 - differing))
        note = f"the models differ on {differing} test patient{'s' * (differing > 1)} only"
    if p >= 1 - LEVEL:  # interval and p-value tell one story
        low, high = min(low, 0.0), max(high, 0.0)
    return {"low": float(min(low, gain)), "high": float(max(high, gain)), "p": p, "note": note}


def _with_seeds(
    gain: float, of_patients: tuple[float, float, float], by_seed: Floats, error: float, patients: float
) -> tuple[float, float, float]:
    """Return interval and p-value with the spread between seeds added to what patients alone give.

    Args:
        gain: mean over seeds.
        of_patients: low, high and p from resampled patients.
        by_seed: gain of each seed (S,).
        error: standard deviation of the resamples.
        patients: how many the gain rests on.
    """
    low, high, p = of_patients
    free = len(by_seed) - 1
    spread = float(by_seed.std(ddof=1)) / len(by_seed) ** 0.5
    reach = -float(stdtrit(free, (1 - LEVEL) / 2)) * spread
    low, high = gain - float(np.hypot(gain - low, reach)), gain + float(np.hypot(high - gain, reach))
    error *= (patients / (patients - 1)) ** 0.5
    total = float(np.hypot(error, spread))
    if total > 0:  # Welch and Satterthwaite's degrees of freedom
        freedom = total**4 / (error**4 / (patients - 1) + spread**4 / free)
        p = max(p, 2 * float(stdtr(freedom, -abs(gain) / total)))
    if low <= 0 <= high:
        p = max(p, 1 - LEVEL)
    return low, high, p


def _paired(runs_a: Sequence[Run], runs_b: Sequence[Run]) -> list[tuple[Run, Run]]:
    if len(runs_a) != len(runs_b):
        raise DataError(
            f"{len(runs_a)} runs against {len(runs_b)}",
            where="paired gain",
            fix="give both models the same seeds",
            code="metric-input",
        )
    pairs = [(check(*a), check(*b)) for a, b in zip(runs_a, runs_b, strict=True)]
    for s, (a, b) in enumerate(pairs):
        if a[0].shape != b[0].shape or not np.array_equal(a[1], b[1]) or not np.array_equal(a[2], b[2]):
            raise DataError(
                "the two models were not tested on the same images",
                where=f"paired gain, seed number {s + 1}",
                fix="use one split file for both runs and keep the order of the test images",
                code="metric-input",
            )
    if len({classes_of(a) for a, _ in pairs if not is_ranked(a)}) > 1:
        raise DataError(
            "the seeds differ in their number of classes",
            where="paired gain",
            fix="give probabilities for all classes of the federation in every run",
            code="metric-input",
        )
    return pairs


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for their number by Holm's step-down method; None stays None, uncounted.

    References:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Statistics 6 (1979).

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def verdict(site: str, gain: dict[str, Any], other: str, *, subject: str = "joining the federation") -> str:
    """Return what :func:`paired_gain` found, in words for a clinician.

    Args:
        site: name of the hospital.
        gain: what :func:`paired_gain` returned.
        other: what A is compared with: ``"local"``, ``"pooled"`` or a phrase such as ``"plain averaging"``.
        subject: what A is.
    """
    against, measure = OTHERS.get(other, other), spoken(gain.get("metric", "balanced_accuracy"))
    people = f"{gain['patients']} test patient{'s' * (gain['patients'] != 1)}"
    if gain["gain"] is None:
        return f"At {site}, {subject} cannot be compared with {against}: {gain['note']}."
    points = 100 * gain["gain"]
    if gain["low"] is None:
        return (
            f"At {site}, {people} cannot show whether {subject} helped or harmed compared with {against} "
            f"(difference in {measure} {signed(points)} points)."
        )
    low, high = 100 * gain["low"], 100 * gain["high"]
    caution = f" Only {people}: read this with caution." if gain["patients"] < FEW_PATIENTS else ""
    if gain["seeds"] == 1 and not low <= 0 <= high:
        caution += " One training run: chance between runs is not in the interval."
    paid = other in ("local", OTHERS["local"])
    if low > 0:
        return (
            f"At {site}, {subject} raised the {measure} by {points:.1f} points "
            f"(95 % interval {low:.1f} to {high:.1f}) over {against}{': joining paid' * paid}.{caution}"
        )
    if high < 0:
        return (
            f"At {site}, {subject} lowered the {measure} by {-points:.1f} points "
            f"(95 % interval {-high:.1f} to {-low:.1f}) compared with {against}"
            f"{': joining did not pay' * paid}.{caution}"
        )
    return (
        f"At {site}, there is no evidence that {subject} helped or harmed compared with {against} "
        f"(difference in {measure} {signed(points)} points, "
        f"95 % interval {signed(low)} to {signed(high)}).{caution}"
    )


def spoken(metric: str) -> str:
    """Return the name of a metric as it stands in a sentence: ``balanced_accuracy`` is "balanced accuracy"."""
    words = {
        "auroc": "AUROC",
        "box_f1": "F1 of boxes",
        "dice": "Dice",
        "harrell": "concordance",
        "explained": "explained share",
        "matched": "share of matched views",
        "told": "share of slabs told right",
    }
    return words.get(metric, metric.replace("_", " "))


def signed(points: float) -> str:
    """Return points with their sign, a true minus, and one decimal; ``0.0`` without one."""
    text = f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text

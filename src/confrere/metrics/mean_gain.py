"""Whether one of many methods is better than another over all hospitals, each hospital counting the same.

Shapes: N images, K classes, P patients of a hospital, S seeds, R resamples (row 0 is the sample).

Patients are drawn hospital by hospital, and the drawn patients serve all methods and seeds, as in
:mod:`confrere.metrics.paired`: so a method is resampled once, however many it is compared with. A hospital with
fewer than ``ENOUGH_PATIENTS`` test patients says nothing about chance and takes no part. Resamples of few patients
vary too little, by sqrt((P - 1) / P); every hospital's are widened by that before they are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from confrere.metrics.bootstrap import (
    ENOUGH_PATIENTS,
    Floats,
    draw,
    effective_patients,
    mean_defined,
    per_patient,
    ratio,
)
from confrere.metrics.classification import check
from confrere.metrics.paired import Run, classes_of, concordance, events_of_patients, hits, inference, is_ranked


@dataclass(frozen=True, kw_only=True)
class SiteScores:
    """Balanced accuracy of every method at one hospital under the same resamples of its patients.

    Args:
        scores: by method (1 + R, S).
        right: by method, how many images of a patient and class are right (S, P, K).
        patients: P. effective: how many an average over classes rests on.
    """

    scores: Mapping[str, Floats]
    right: Mapping[str, Floats]
    patients: int
    effective: float


def resample_site(
    runs: Mapping[str, Sequence[Run]], *, generator: np.random.Generator, resamples: int
) -> SiteScores | None:
    """Return the resampled scores of one hospital, or None when it has too few test patients.

    Args:
        runs: by method, per seed (probabilities (N, K), labels (N,), groups (N,)); the same test images in the
            same order for all.
        generator: source of the resamples.
        resamples: R.
    """
    checked = {name: [check(*run) for run in by_seed] for name, by_seed in runs.items()}
    _, labels, groups = next(iter(checked.values()))[0]
    everyone, patient_N = np.unique(groups, return_inverse=True)
    first = next(iter(checked.values()))[0]
    P = len(everyone)
    if P < ENOUGH_PATIENTS:
        return None
    weights = draw(P, generator, resamples)
    scores, right = {}, {}
    if is_ranked(first):
        for name, by_seed in checked.items():
            told = [concordance(run, patient_N, weights) for run in by_seed]
            scores[name] = np.stack([samples for samples, _ in told], axis=1)
            right[name] = np.stack([ranks for _, ranks in told])
        images_PK = events_of_patients(first, patient_N, P)
        return SiteScores(scores=scores, right=right, patients=P, effective=effective_patients(images_PK))
    K = classes_of(first)
    images_PK = per_patient(patient_N, labels, (P, K))
    below = weights @ images_PK
    for name, by_seed in checked.items():
        found = [per_patient(patient_N, labels, (P, K), hits(run)) for run in by_seed]
        scores[name] = np.stack([mean_defined(ratio(weights @ one, below)) for one in found], axis=1)
        right[name] = np.stack(found)
    return SiteScores(scores=scores, right=right, patients=P, effective=effective_patients(images_PK))


def mean_gain(sites: Sequence[SiteScores], a: str, b: str) -> dict[str, Any]:
    """Return the gain of A over B, the mean over hospitals and seeds, its 95 % interval and two-sided p-value.

    Args:
        sites: of the hospitals that have enough test patients.
        a: a method.
        b: another.

    Returns:
        What :func:`confrere.metrics.paired.paired_gain` does, and ``sites``: how many the gain rests on.
    """
    out: dict[str, Any] = {"metric": "balanced_accuracy", "gain": None, "low": None, "high": None, "p": None}
    out |= {"patients": sum(site.patients for site in sites), "sites": len(sites), "seeds": 0, "note": None}
    if not sites:
        return out | {"note": f"no hospital has {ENOUGH_PATIENTS} test patients"}
    of_sites = [_widened(site.scores[a] - site.scores[b], site.effective) for site in sites]
    samples_RS = np.mean(of_sites, axis=0)
    differing = sum(int((site.right[a] != site.right[b]).any(axis=(0, 2)).sum()) for site in sites)
    patients = _patients([one.mean(axis=1) for one in of_sites], [site.effective for site in sites])
    out |= {"gain": float(samples_RS[0].mean()), "seeds": samples_RS.shape[1]}
    return out | inference(samples_RS.mean(axis=1), samples_RS[0], patients, differing)


def mean_score(sites: Sequence[SiteScores], name: str) -> dict[str, float | None]:
    """Return the mean score of a method over hospitals and seeds with its 95 % interval over patients, in 0..1."""
    if not sites:
        return {"mean": None, "low": None, "high": None}
    of_sites = [_widened(site.scores[name], site.effective).mean(axis=1) for site in sites]
    samples = np.mean(of_sites, axis=0)
    low, high = np.nanquantile(samples[1:], [0.025, 0.975])
    return {"mean": float(samples[0]), "low": max(0.0, float(low)), "high": min(1.0, float(high))}


def _widened(samples_RS: Floats, patients: float) -> Floats:
    own = samples_RS[:1]
    wider: Floats = own + (samples_RS - own) * (patients / (patients - 1)) ** 0.5
    return wider


def _patients(samples: Sequence[Floats], patients: Sequence[float]) -> float:
    """Return one more than Welch and Satterthwaite's degrees of freedom of a mean of independent hospitals."""
    variances = np.array([np.nanvar(one[1:]) for one in samples])  # undefined where no pair of a resample compares
    free = np.array(patients) - 1
    if not variances.any():
        return 1.0 + float(free.sum())
    return 1.0 + float(variances.sum() ** 2 / (variances**2 / free).sum())

"""Metrics of single-label classification with 95 % intervals over patients.

Shapes: N images, K classes, P patients, R resamples (row 0 of a weight matrix is the sample itself).

Definitions. The prediction is the most probable class (the first one on a tie). A class is *present* in a
sample or resample when it has an image there. Balanced accuracy is the mean recall over present classes; F1
is averaged over present classes, AUROC over classes that have both images and others to tell them from.
A resample in which a class vanishes still counts: its averages run over the classes that remain. Recall of a
single class is undefined there, and such a resample is left out of that class's interval only.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    exact,
    is_flat,
    mean_defined,
    per_patient,
    percentile,
    ratio,
)
from confrere.metrics.calibration import bin_of
from confrere.metrics.findings import auroc, check_findings

BINS = 10


def evaluate(
    probabilities: Floats,
    labels: Ints,
    groups: Ints,
    *,
    classes: Sequence[str],
    generator: np.random.Generator,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Return every metric with its 95 % interval from resampled patients, ready for JSON.

    Args:
        probabilities: (N, K) in 0..1, rows sum to 1. N may be 0.
        labels: (N,) true classes 0..K-1.
        groups: (N,) patient of each image.
        classes: K names.
        generator: source of the resamples.
        resamples: R.

    Returns:
        ``n``, ``patients``; ``balanced_accuracy``, ``auroc``, ``f1``, ``accuracy``, ``ece``, each
        ``{"value", "low", "high"}`` in 0..1 with None for what is undefined; ``recall`` by class (None when
        absent); ``confusion`` (K rows of truth, K columns of prediction); ``absent`` classes; ``notes``.

    Raises:
        DataError: shapes, labels or probabilities are wrong.
    """
    probabilities, labels, groups = check(probabilities, labels, groups, n_classes=len(classes))
    patient_N = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    P = int(patient_N.max(initial=-1)) + 1
    samples, confusion_PKK = _samples(probabilities, labels, patient_N, draw(P, generator, resamples))
    images_PK = confusion_PKK.sum(2)
    effective = effective_patients(images_PK)
    here = [k for k in range(len(classes)) if images_PK[:, k].any()]
    recall = {classes[k]: _proportion(samples["recall"][:, k], images_PK[:, k]) for k in here}
    out: dict[str, Any] = {"n": len(labels), "patients": P}
    out["balanced_accuracy"] = _balanced(samples["balanced_accuracy"], P, effective, recall)
    for name in ("auroc", "f1"):
        out[name] = percentile(samples[name][0], samples[name][1:], P, effective=effective)
    out["accuracy"] = _proportion(samples["accuracy"], images_PK.sum(1))
    out["ece"] = percentile(samples["ece"][0], samples["ece"][1:], P, biased=True)
    out["confusion"] = confusion_PKK.sum(0).astype(int).tolist()
    out["recall"] = {name: recall.get(name) for name in classes}
    out["absent"] = [name for name in classes if name not in recall]
    out["notes"] = _notes(out, samples, samples["recall"][1:, here])
    return out


def score(probabilities: Floats, labels: Ints) -> float:
    """Return the balanced accuracy over present classes, in 0..1.

    Args:
        probabilities: (N, K) probabilities or any scores of which the largest wins.
        labels: (N,) true classes 0..K-1.

    Raises:
        DataError: there are no images, or the shapes differ.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise DataError(
            f"cannot score {probabilities.shape} probabilities against {labels.shape} labels",
            where="balanced accuracy",
            fix="give (N, K) probabilities and (N,) labels with N >= 1",
            code="metric-input",
        )
    right = probabilities.argmax(axis=1) == labels
    return float(np.mean([right[labels == k].mean() for k in np.unique(labels)]))


def confidence(probabilities: Floats, labels: Ints) -> float:
    """Return the mean probability of the true class, averaged over the classes present, in 0..1.

    Balanced accuracy's smooth sibling: it chooses the round. Where a class has one validation image, balanced
    accuracy jumps by 1/K when that image flips; this moves with its probability.

    Args:
        probabilities: (N, K), rows sum to 1, N >= 1.
        labels: (N,) true classes 0..K-1.
    """
    true = probabilities[np.arange(len(labels)), labels]
    return float(np.mean([true[labels == k].mean() for k in np.unique(labels)]))


def check(
    probabilities: Floats, labels: Ints, groups: Ints, *, n_classes: int | None = None
) -> tuple[Floats, Ints, Ints]:
    """Return the three arrays in their standard types.

    Raises:
        DataError: shapes differ, a label is no class, or rows are not probabilities.
    """
    p, y, g = np.asarray(probabilities, np.float64), np.asarray(labels, np.int64), np.asarray(groups)
    if p.ndim == y.ndim == 2:  # a probability for every finding
        check_findings(p, y, g)
        return p, y, g
    if p.ndim == 1:  # a value for every image, or a risk for every patient
        return _risks(p, np.asarray(labels, np.float64), g) if y.ndim == 2 else _values(p, y, g)
    if p.ndim != 2 or y.shape != p.shape[:1] or g.shape != y.shape or n_classes not in (None, p.shape[-1]):
        raise DataError(
            f"probabilities {p.shape}, labels {y.shape}, groups {g.shape} and {n_classes} classes do not fit",
            where="evaluation",
            fix="give probabilities (N, K), labels (N,), groups (N,) and K class names",
            code="metric-input",
        )
    if len(y) and not (y.min() >= 0 and y.max() < p.shape[1]):
        raise DataError(
            f"labels run from {y.min()} to {y.max()}",
            where="evaluation",
            fix=f"labels are class numbers 0 to {p.shape[1] - 1}",
            code="metric-input",
        )
    if not (np.isfinite(p).all() and (p >= -1e-6).all() and (np.abs(p.sum(axis=1) - 1) < 1e-3).all()):
        raise DataError(
            "rows are not probabilities (finite, not negative, summing to 1)",
            where="evaluation",
            fix="apply softmax to the logits; NaN means that training diverged",
            code="metric-input",
        )
    return np.clip(p, 0.0, 1.0), y, g


def _values(values: Floats, labels: Ints, groups: Ints) -> tuple[Floats, Ints, Ints]:
    fits = labels.shape == groups.shape == values.shape and not labels.any()
    if not fits or not (np.isfinite(values) & (values >= 0) & (values <= 1)).all():
        what, fix = "values are not one in 0..1 for each image", "leave out images without a value"
        raise DataError(what, where="evaluation", fix=fix, code="metric-input")
    return values, labels, groups


def _risks(risks: Floats, targets: Floats, groups: Ints) -> tuple[Floats, Any, Ints]:
    fits = risks.shape == groups.shape and targets.shape == (len(risks), 2)
    if not fits or not (np.isfinite(risks).all() and np.isfinite(targets).all() and (targets >= 0).all()):
        what, fix = "risks and times are not one of each for a patient", "give (N,), (N, 2) and (N,)"
        raise DataError(what, where="evaluation", fix=fix, code="metric-input")
    return risks, targets, groups


def _samples(probabilities: Floats, labels: Ints, patient_N: Ints, weights: Floats) -> tuple[dict[str, Floats], Floats]:
    """Return each metric of every row of ``weights``, and the confusion matrix of each patient (P, K, K)."""
    P, K = weights.shape[1], probabilities.shape[1]
    cells_PC = per_patient(patient_N, labels * K + probabilities.argmax(axis=1), (P, K * K))
    counts_RKK = (weights @ cells_PC).reshape(-1, K, K)
    hits_RK = np.einsum("rkk->rk", counts_RKK)
    truth_RK, guess_RK = counts_RKK.sum(2), counts_RKK.sum(1)
    recall_RK = ratio(hits_RK, truth_RK)
    f1_RK = np.where(truth_RK > 0, ratio(2 * hits_RK, truth_RK + guess_RK), np.nan)
    samples = {
        "recall": recall_RK,
        "balanced_accuracy": mean_defined(recall_RK),
        "f1": mean_defined(f1_RK),
        "accuracy": ratio(hits_RK.sum(1), truth_RK.sum(1)),
        "auroc": _auroc(probabilities, labels, patient_N, weights),
        "ece": _ece(probabilities, labels, patient_N, weights),
    }
    return samples, cells_PC.reshape(P, K, K)


def _auroc(probabilities: Floats, labels: Ints, patient_N: Ints, weights: Floats) -> Floats:
    """Return the macro one-versus-rest AUROC of each row of ``weights`` (R, P)."""
    of_images = weights[:, patient_N]
    by_class = [auroc(probabilities[:, k], labels == k, of_images) for k in range(probabilities.shape[1])]
    return mean_defined(np.stack(by_class, axis=1))


def _ece(probabilities: Floats, labels: Ints, patient_N: Ints, weights: Floats) -> Floats:
    confidence_N = probabilities.max(axis=1)
    gap_N = (probabilities.argmax(axis=1) == labels) - confidence_N
    P = weights.shape[1]
    gaps_PB = per_patient(patient_N, bin_of(confidence_N, BINS), (P, BINS), gap_N)
    images_P = per_patient(patient_N, np.zeros_like(patient_N), (P, 1))
    return ratio(np.abs(weights @ gaps_PB).sum(1), (weights @ images_P)[:, 0])


def _proportion(samples: Floats, images_P: Floats) -> Estimate:
    """Return accuracy or recall by resampling, or by exact bounds where resampling has nothing to say."""
    patients = int((images_P > 0).sum())
    if patients < ENOUGH_PATIENTS or is_flat(samples):
        return exact(samples[0], images_P)
    return percentile(samples[0], samples[1:], patients)


def _balanced(samples: Floats, patients: int, effective: float, recall: dict[str, Estimate]) -> Estimate:
    """Return balanced accuracy; if all resamples agree, with the mean of the recalls' exact bounds.

    These are valid: were the truth below the mean bound, some recall would lie below its own.
    """
    estimate = percentile(samples[0], samples[1:], patients, effective=effective)
    if recall and patients >= ENOUGH_PATIENTS and is_flat(samples):
        for end in ("low", "high"):
            estimate[end] = float(np.mean([r[end] for r in recall.values()]))
    return estimate


def _notes(out: dict[str, Any], samples: dict[str, Floats], recall_RK: Floats) -> list[str]:
    if not out["n"]:
        return ["There are no test images, so nothing can be measured."]
    notes = []
    if out["absent"]:
        notes.append(f"No test image of {', '.join(out['absent'])}: averages run over the other classes.")
    if out["auroc"]["value"] is None:
        notes.append("AUROC is undefined because all test images are of one class.")
    if out["patients"] < ENOUGH_PATIENTS:
        notes.append(
            f"Fewer than {ENOUGH_PATIENTS} test patients: no resampling intervals; "
            "those of accuracy and recall are exact binomial ones."
        )
        return notes
    flat = [name for name in ("auroc", "f1", "ece") if is_flat(samples[name])]
    if flat:
        notes.append(f"All resamples agree on {', '.join(flat)}, so no interval can be given.")
    vanished = float(np.isnan(recall_RK).any(axis=1).mean()) if len(recall_RK) else 0.0
    if vanished >= 0.01:
        notes.append(
            f"In {vanished:.0%} of the resamples a class has no patient; there averages run over the classes left."
        )
    return notes

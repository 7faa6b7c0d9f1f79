"""Calibration: a stated probability of 80 % should come true in 80 % of cases.

Shapes: N images, K classes. Confidence is the largest class probability. Bins are of equal width, closed
below; the last is closed on both sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from confrere.errors import DataError
from confrere.metrics.bootstrap import Floats, Ints

ENOUGH_EXAMPLES = 20
TEMPERATURES = (0.1, 10.0)


def bin_of(confidence_N: Floats, bins: int) -> Ints:
    """Return the bin 0..bins-1 of each confidence in [0, 1]."""
    return np.minimum((confidence_N * bins).astype(np.int64), bins - 1)


def reliability(probabilities: Floats, labels: Ints, bins: int = 10) -> list[dict[str, Any]]:
    """Return ``low``, ``high``, ``n``, mean ``confidence`` and ``accuracy`` (None if empty) of each bin.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) true classes.
        bins: number of bins of equal width.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    place = bin_of(confidence, bins)
    records = []
    for b in range(bins):
        inside = place == b
        n = int(inside.sum())
        records.append(
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "n": n,
                "confidence": float(confidence[inside].mean()) if n else None,
                "accuracy": float(right[inside].mean()) if n else None,
            }
        )
    return records


def ece(probabilities: Floats, labels: Ints, bins: int = 10) -> float | None:
    """Return the expected calibration error in 0..1, None without images.

    The mean over images of ``|accuracy - confidence|`` of their bin. Chance alone makes it positive, the more
    so the fewer the images.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    records = [r for r in reliability(probabilities, labels, bins) if r["n"]]
    if not records:
        return None
    return float(sum(r["n"] * abs(r["accuracy"] - r["confidence"]) for r in records) / len(labels))


def calibration_note(logits: NDArray[Any], labels: Ints, *, weights: Floats | None = None) -> str:
    """Return why no temperature can be fitted, or an empty string when it can.

    Args:
        logits: (N, K) finite scores.
        labels: (N,) classes of 0..K-1.
        weights: (N,) non-negative importance of each image; images of weight 0 do not count.
    """
    used = np.ones(len(labels), bool) if weights is None else np.asarray(weights) > 0
    if used.sum() < ENOUGH_EXAMPLES:
        return f"Fewer than {ENOUGH_EXAMPLES} validation images: the temperature stays 1."
    if len(np.unique(labels[used])) < 2:
        return "Validation images of one class only: the temperature stays 1."
    if bool((logits.argmax(axis=1) == labels)[used].all()):
        # The likelihood then grows without end as the temperature falls: the bound would be the answer.
        return "Every validation image is classified correctly: the temperature stays 1."
    return ""


def fit_temperature(logits: NDArray[Any], labels: Ints, *, weights: Floats | None = None) -> float:
    """Return the temperature T in 0.1..10 with the least negative log-likelihood of ``softmax(logits / T)``.

    1.0 where :func:`calibration_note` says that none can be fitted.

    Raises:
        DataError: logits, labels and weights do not fit together, or are not finite.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    from scipy.optimize import minimize_scalar  # slow to import

    z = np.asarray(logits, dtype=np.float64)
    y = np.asarray(labels, dtype=np.int64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    _check(z, y, w)
    if calibration_note(z, y, weights=w):
        return 1.0
    z = z - z[np.arange(len(y)), y][:, None]

    def loss(log_temperature: float) -> float:
        return float(np.average(logsumexp(z / np.exp(log_temperature), axis=1), weights=w))

    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def _check(z: Floats, y: Ints, w: Floats) -> None:
    if z.ndim != 2 or y.shape != z.shape[:1] or w.shape != y.shape:
        raise DataError(
            f"logits {z.shape}, labels {y.shape} and weights {w.shape} do not fit together",
            where="temperature",
            fix="give logits (N, K), labels (N,) and weights (N,)",
            code="metric-input",
        )
    if not np.isfinite(z).all() or not np.isfinite(w).all() or (w < 0).any():
        raise DataError(
            "logits or weights are not finite, or a weight is negative",
            where="temperature",
            fix="look for diverged training before calibrating",
            code="metric-input",
        )
    if len(y) and not (y.min() >= 0 and y.max() < z.shape[1]):
        raise DataError(
            f"labels run from {y.min()} to {y.max()}",
            where="temperature",
            fix=f"labels are class numbers 0 to {z.shape[1] - 1}",
            code="metric-input",
        )

"""A linear classifier of updates, trained on shadow updates of which the adversary knows the property."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confrere.audits.property import Floats
from confrere.errors import ConfigError
from confrere.seeds import numpy_generator

LR, EPOCHS, BATCH = 0.01, 50, 16
MOST = 0.99
"""Of persistence: with 1 no round would say more than another, and the system could have no solution."""
LEAST = 20
"""Shadow updates of either kind below which variances say nothing."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """An affine score of an update u (d,): ``direction . u + offset``, positive for the property.

    ``mean_with``, ``var_with``, ``mean_without``, ``var_without`` and ``accuracy`` are of shadow updates that neither
    trained the classifier nor chose its epoch; ``deviations`` are their standardised scores, in the order they came in.
    """

    direction: Floats
    offset: float
    mean_with: float
    var_with: float
    mean_without: float
    var_without: float
    accuracy: float
    deviations: Floats


def train_score(
    updates: NDArray[np.floating], labels: NDArray[np.bool_], *, seed: int, epochs: int = EPOCHS, lr: float = LR
) -> Score:
    """Return the score that separates shadow updates (S, d) by their labels (S,), True for those with the property.

    Logistic regression on standardised numbers by stochastic gradient descent, 16 updates a step, without penalty, as
    in PROLIN; the epoch is the one of the best accuracy on a second part. All draws have addresses ("shadow-...",).
    Difference from the paper: a third part, never looked at, gives means and variances, which would else be
    optimistic. Parts are 60, 20 and 20 % of either kind, the same rows for the same labels and seed.

    Raises:
        ConfigError: fewer than 20 of either kind, or updates that are not finite.
    """
    if min(labels.sum(), (~labels).sum()) < LEAST or not np.isfinite(updates).all():
        what = f"shadow updates must be finite, and at least {LEAST} of either kind"
        raise ConfigError(what, where="property inference", fix="use more shadows, or a lower train.lr", code="audit")
    fit, choose, judge = _parts(labels, seed)
    centre, scale = updates[fit].mean(0, dtype=np.float64), updates[fit].std(0, dtype=np.float64)
    scale[scale <= 1e-12 * max(1.0, float(scale.max()))] = np.inf  # coordinates that never move say nothing
    x, target = ((updates - centre) / scale).astype(np.float64), labels.astype(np.float64)
    c, a, best, kept = np.zeros(x.shape[1]), 0.0, -1.0, (np.zeros(x.shape[1]), 0.0)
    for epoch in range(epochs):
        order = fit[numpy_generator(seed, "shadow-batches", epoch).permutation(len(fit))]
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            error = _sigmoid(x[rows] @ c + a) - target[rows]
            c, a = c - lr * x[rows].T @ error / len(rows), a - lr * float(error.mean())
        right = float(((x[choose] @ c + a > 0) == labels[choose]).mean())
        if right > best:
            best, kept = right, (c.copy(), a)
    direction = kept[0] / scale
    offset = kept[1] - float(direction @ centre)
    scores = updates[judge].astype(np.float64) @ direction + offset
    is_with = labels[judge]
    means = [float(scores[mask].mean()) for mask in (is_with, ~is_with)]
    variances = [float(scores[mask].var(ddof=1)) or 1e-12 for mask in (is_with, ~is_with)]
    deviations = (scores - np.where(is_with, *means)) / np.sqrt(np.where(is_with, *variances))
    return Score(
        direction=direction,
        offset=offset,
        mean_with=means[0],
        var_with=variances[0],
        mean_without=means[1],
        var_without=variances[1],
        accuracy=float(((scores > 0) == is_with).mean()),
        deviations=deviations,
    )


def persistence(deviations: Floats) -> float:
    """Return the mean correlation, clipped to [0, 0.99], of the shadows' standardised scores (R, S) between two rounds.

    It means something if the same shadow data were trained on in every round. 0 for one round.
    """
    rounds, size = deviations.shape
    if rounds < 2 or not size:
        return 0.0
    squares = (deviations**2).sum()
    between = ((deviations.sum(0) ** 2).sum() - squares) / (rounds - 1)
    return float(np.clip(between / squares, 0, MOST)) if squares else 0.0


def _parts(labels: NDArray[np.bool_], seed: int) -> list[NDArray[np.int64]]:
    """Return three sets of rows, each with the same share of either kind."""
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for kind in (True, False):
        rows = numpy_generator(seed, "shadow-parts", int(kind)).permutation(np.flatnonzero(labels == kind))
        cuts = round(0.6 * len(rows)), round(0.8 * len(rows))
        for part, some in zip(parts, np.split(rows, cuts), strict=True):
            part.append(some)
    return [np.sort(np.concatenate(part)) for part in parts]


def _sigmoid(x: Floats) -> Floats:
    positive: Floats = 0.5 * (1 + np.tanh(0.5 * x))
    return positive

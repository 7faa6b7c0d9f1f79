"""Federated logistic regression with record-level (epsilon, delta)-differential privacy, or none.

Each round every site sums the gradients of its units, each cut to length ``clip``, and adds Gaussian noise of
standard deviation ``sigma * clip`` itself: no server is trusted. The server divides the sum over sites by a public
number of units and takes a step. No unit is sampled, so nothing is amplified, and the accounting is that of ``rounds``
Gaussian releases (:mod:`confrere.privacy.accounting`, exact curve).

Shapes: N records, F features, C = F + 1 weights; the last is the intercept.

References:
    Abadi et al., CCS 2016 (clipping and noise). Differences: whole batches; noise at each site; a unit's gradient is
    the mean over its records, cut once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confrere.errors import ConfigError
from confrere.privacy.accounting import calibrate_sigma
from confrere.seeds import numpy_generator


@dataclass(frozen=True)
class SiteRows:
    """One site's encoded records: (N, F) features, (N,) targets 0 or 1, (N,) units."""

    features: NDArray[np.float64]
    targets: NDArray[np.float64]
    units: NDArray[np.int64]


def noise_for(epsilon: float, delta: float, rounds: int) -> float:
    """Return the least sigma whose ``rounds`` releases cost at most ``epsilon``, 0 for an infinite one; ConfigError."""
    if epsilon == math.inf:
        return 0.0
    return calibrate_sigma(epsilon, rounds=rounds, delta=delta, sampling="all")


def fit(
    sites: Sequence[SiteRows],
    *,
    sigma: float = 0.0,
    clip: float = math.inf,
    rounds: int = 100,
    lr: float = 1.0,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return (C,) weights.

    Args:
        sites: of one or more sites, same features.
        sigma: noise at each site in units of ``clip``; 0 for none.
        clip: largest length of a unit's gradient; infinite for none, then sigma must be 0.
        rounds: whole-batch steps.
        lr: step size.
        seed: of the noise. Whoever knows it can take the noise away: for experiments only.

    Raises:
        ConfigError: noise without a clip.
    """
    if sigma > 0 and not math.isfinite(clip):
        raise ConfigError("noise without a clip protects nobody", where="clip", fix="give a clip", code="privacy")
    inputs = [np.hstack([site.features, np.ones((len(site.features), 1))]) for site in sites]
    groups = [np.unique(site.units, return_inverse=True)[1] for site in sites]
    expected = sum(int(group.max()) + 1 for group in groups)  # public, as sites' sizes are in federated averaging
    weights = np.zeros(inputs[0].shape[1])
    for step in range(rounds):
        total = np.zeros_like(weights)
        for number, (x, site, group) in enumerate(zip(inputs, sites, groups, strict=True)):
            total += _clipped_sum(x, site.targets, group, weights, clip)
            if sigma > 0:
                rng = numpy_generator(seed, "noise", step, number)
                total += rng.normal(0.0, sigma * clip, weights.shape)
        weights = weights - lr * total / expected
    return weights


def _clipped_sum(
    x: NDArray[np.float64], y: NDArray[np.float64], group: NDArray[np.int64], weights: NDArray[np.float64], clip: float
) -> NDArray[np.float64]:
    residual = chance(x, weights) - y  # x has its column of ones
    order = np.argsort(group, kind="stable")
    size = np.bincount(group)
    starts = np.concatenate([[0], np.cumsum(size)[:-1]])
    gradients = np.add.reduceat((residual[:, None] * x)[order], starts, axis=0) / size[:, None]
    length = np.linalg.norm(gradients, axis=1, keepdims=True)
    made: NDArray[np.float64] = (gradients * np.minimum(1.0, clip / np.maximum(length, 1e-300))).sum(0)
    return made


def chance(x: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N,) the probability of target 1; ``x`` (N, F) gets its intercept, (N, C) has it."""
    full = x if x.shape[1] == len(weights) else np.hstack([x, np.ones((len(x), 1))])
    logits = np.clip(full @ weights, -500, 500)
    made: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits))
    return made

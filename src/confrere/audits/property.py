"""Property inference against sums of updates: what a server learns of single sites under secure aggregation.

Secure aggregation hides every update and shows a sum a round. As other sites take part in other rounds, the scores that
a classifier gives to the sums are a linear system whose unknowns are the sites' own scores.

Shapes: R rounds, N sites, d numbers of an update.

Sources: PROLIN (Kerkouche, Ács and Fritz, "Client-specific property inference against secure aggregation in federated
learning", WPES 2023) for the system, :func:`least_squares`, :func:`ridge`, :func:`density` and, in
:mod:`confrere.audits.property_prolin`, the joint estimate; :func:`vote` is its baseline. :func:`posterior` is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from confrere.errors import ConfigError

Floats = NDArray[np.float64]
PENALTY = 5.0
"""Of the ridge, as in PROLIN."""
LEVEL = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, kw_only=True)
class System:
    """What the adversary holds after R rounds.

    Args:
        A: (R, N), how often each site's update is in the sum: 1, or its weight over the mean weight of those who took
            part; 0 for who did not.
        b: (R,), the score of each sum, see :func:`score_of_sum`.
        mean_with, var_with: (R,), of the score of one update made on data that have the property.
        mean_without, var_without: (R,), of data that have it not.
        persistence: correlation in [0, 1) of a site's deviations from these means in two rounds; 0: independent.
        shift: standard deviation, in units of a site's own, of what all sites' scores deviate by together, as where
            shadows train on images that the model has not seen and sites on images that it has; 0: none.
        noise: (R,), variance of what was added to each sum's score on purpose, which is no secret; None: nothing.

    Raises:
        ConfigError: shapes that do not fit, numbers that are not finite, a variance that is not positive.
    """

    A: Floats
    b: Floats
    mean_with: Floats
    var_with: Floats
    mean_without: Floats
    var_without: Floats
    persistence: float = 0.0
    shift: float = 0.0
    noise: Floats | None = None

    def __post_init__(self) -> None:
        parts = [self.b, self.mean_with, self.var_with, self.mean_without, self.var_without]
        parts += [self.noise] if self.noise is not None else []
        shapes = {part.shape for part in parts}
        sound = (
            self.A.ndim == 2 and shapes == {(len(self.A),)} and 0 <= self.persistence < 1 and 0 <= self.shift < np.inf
        )
        numbers = [self.A.ravel(), *parts] if sound else []
        variances = min(self.var_with.min(initial=1.0), self.var_without.min(initial=1.0))
        if not sound or not all(np.isfinite(n).all() for n in numbers) or self.A.min(initial=0.0) < 0 or variances <= 0:
            what, fix = "these rounds make no linear system", "give finite numbers and positive variances of each round"
            raise ConfigError(what, where="property inference", fix=fix, code="audit")

    def until(self, rounds: int) -> System:
        """Return the system of the first ``rounds`` rounds."""
        names = ("A", "b", "mean_with", "var_with", "mean_without", "var_without", "noise")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{name: value[:rounds] for name, value in found.items() if value is not None})

    @property
    def weights(self) -> Floats:
        """Return how well each round's classifier separates, (R,): one minus the overlap of the two normals."""
        rows = zip(self.mean_with, self.var_with, self.mean_without, self.var_without, strict=True)
        return np.array([1 - NormalDist(m1, v1**0.5).overlap(NormalDist(m0, v0**0.5)) for m1, v1, m0, v0 in rows])


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Estimates of tau (N,), their standard deviations, and the two ends of a 95 % interval within [0, 1]."""

    mean: Floats
    sd: Floats
    low: Floats
    high: Floats


def score_of_sum(direction: Floats, offset: float, total: Floats, row: Floats) -> float:
    """Return ``sum_k row_k (direction . u_k + offset)`` of an observed ``total = sum_k row_k u_k``.

    The offset counts once for each update in the sum: left out, or averaged, it breaks the system silently.
    """
    return float(direction @ total + row.sum() * offset)


def least_squares(system: System) -> Floats:
    """Return the sites' scores (N,), the shortest of the solutions; a site has the property where its score is > 0.

    Useless where there are about as many rounds as sites: noise is then amplified most (double descent).
    """
    return np.asarray(np.linalg.lstsq(system.A, system.b, rcond=None)[0], dtype=np.float64)


def ridge(system: System, penalty: float = PENALTY) -> Floats:
    """Return ``argmin_x sum_r w_r (A_r x - b_r)^2 + penalty ||x||^2`` with :attr:`System.weights`, (N,)."""
    weighted = system.A.T * system.weights
    gram = weighted @ system.A + penalty * np.eye(system.A.shape[1])
    return np.asarray(np.linalg.solve(gram, weighted @ system.b), dtype=np.float64)


def density(system: System, scores: Floats) -> Floats:
    """Return (N,) ``sum over a site's rounds of N(x; with) - N(x; without)``: PROLIN decides for what is > 0.

    A sum of densities, not a ratio of likelihoods: one confident round may decide.
    """
    part = normal(scores, system.mean_with, system.var_with) - normal(scores, system.mean_without, system.var_without)
    decided: Floats = ((system.A > 0) * part).sum(0)
    return decided


def normal(x: Floats, mean: Floats, variance: Floats) -> Floats:
    """Return the density (R, N) of ``x``, (N,) or (R, N), under each round's normal."""
    mean, variance = mean[:, None], variance[:, None]
    found: Floats = np.exp(-0.5 * (x - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
    return found


def posterior(system: System, prior: float) -> Posterior:
    """Return the posterior of tau, 1 for a site that has the property and 0 for one that has it not.

    ``b_r - sum_k A_rk m0_r = sum_k A_rk tau_k (m1_r - m0_r) + e_r`` with ``tau_k ~ N(prior, prior (1 - prior))`` and
    ``Cov(e_r, e_s) = rho_rs sqrt(v_r v_s) sum_k A_rk A_sk``, where ``v = prior v1 + (1 - prior) v0``, ``rho_rr`` is 1
    and otherwise the persistence: what is odd about a site's data is odd in every round, and no number of rounds
    averages it out. ``shift^2 sqrt(v_r v_s) sum_k A_rk sum_k A_sk`` is added, and ``noise`` on the diagonal. One linear
    solve, also for R < N. Where tau is a share between two levels, so is the estimate.

    Args:
        system: see there.
        prior: share of sites expected to have the property, in (0, 1).
    """
    A, spread = system.A, prior * (1 - prior)
    deviation = np.sqrt(prior * system.var_with + (1 - prior) * system.var_without)
    shared = np.outer(deviation, deviation) * (A @ A.T)
    noise = system.persistence * shared + (1 - system.persistence) * np.diag(np.diag(shared))
    noise = noise + system.shift**2 * np.outer(deviation * A.sum(1), deviation * A.sum(1))
    if system.noise is not None:
        noise = noise + np.diag(system.noise)
    design = A * (system.mean_with - system.mean_without)[:, None]
    observed = system.b - A.sum(1) * system.mean_without - design.sum(1) * prior
    # In the space of rounds: (N, R) gain; rounds without anybody say nothing and make no row.
    rows = A.sum(1) > 0
    design, observed, noise = design[rows], observed[rows], noise[np.ix_(rows, rows)]
    gain = spread * np.linalg.solve(spread * design @ design.T + noise, design).T
    mean = prior + gain @ observed
    variance = spread * (1 - np.einsum("nr,rn->n", gain, design))
    sd = np.sqrt(np.clip(variance, 0, None))
    low, high = (np.clip(mean + sign * LEVEL * sd, 0, 1) for sign in (-1, 1))
    return Posterior(mean=mean, sd=sd, low=low, high=high)


def vote(A: Floats, sums: Floats, directions: Floats, offsets: Floats) -> Floats:
    """Return for each site the share of rounds (N,) whose classifier accepts its disaggregated mean update.

    ``pinv(A) sums`` with known A, PROLIN's baseline; > 0.5 decides.

    Args:
        A: (R, N).
        sums: (R, d).
        directions: (R, d), one classifier a round.
        offsets: (R,).
    """
    updates = np.linalg.pinv(A) @ sums
    share: Floats = (updates @ directions.T + offsets > 0).mean(1)
    return share

"""PROLIN's joint estimate: a score for every site in every round, and whether the site has the property."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from confrere.audits.property import Floats, System, normal, ridge
from confrere.seeds import numpy_generator

STEPS, LR, PATIENCE, LEAST = 200_000, 1e-3, 100, 1e-5
BETAS, TINY = (0.9, 0.999, 0.9), 1e-8


def prolin(system: System, *, seed: int = 0, steps: int = STEPS) -> Floats:
    """Return tau (N,) in [0, 1] of the smallest total loss; > 0.5 decides.

    Minimises over X (R, N) and tau the sum of the three of :func:`losses`, each gradient rescaled by :class:`MTAdam`,
    until the total has not fallen by 1e-5 for 100 steps. Both start uniform in [0, 1), drawn at ("prolin",).

    Differences from the paper: where sites have weights, the second loss sums weighted scores, the others count rounds;
    gradients in closed form, in float64.
    """
    generator = numpy_generator(seed, "prolin")
    X: Floats = generator.random(system.A.shape)
    tau: Floats = generator.random((system.A.shape[1],))
    anchor, weights = ridge(system), system.weights
    adam_x, adam_tau = MTAdam(), MTAdam()
    best, stale = tau, 0
    least = last = math.inf
    for _ in range(steps):
        values, of_x, of_tau = losses(system, X, tau, anchor, weights)
        total = sum(values)
        if total < least:
            least, best = total, tau
        stale = stale + 1 if total > last - LEAST else 0
        if stale >= PATIENCE:
            break
        last = last if stale else total
        X = X - adam_x.step(of_x)
        tau = np.clip(tau - adam_tau.step([of_tau, np.zeros_like(tau), np.zeros_like(tau)]), 0, 1)
    return best


def losses(
    system: System, X: Floats, tau: Floats, anchor: Floats, weights: Floats
) -> tuple[tuple[float, float, float], list[Floats], Floats]:
    """Return PROLIN's three losses, their gradients with respect to X, and that of the first with respect to tau.

    ``L1 = -sum log(1 + a_rk [tau_k N(X_rk; with) + (1 - tau_k) N(X_rk; without)])``, ``a_rk`` 1 for who took part;
    ``L2 = sum_r w_r (b_r - sum_k A_rk X_rk)^2``; ``L3 = sum_k (sum_r a_rk X_rk - n_k rho_k)^2`` with the ridge
    ``anchor`` rho (N,) and ``n_k`` rounds of a site.
    """
    part = (system.A > 0).astype(float)
    with_, without = (
        normal(X, mean, variance)
        for mean, variance in ((system.mean_with, system.var_with), (system.mean_without, system.var_without))
    )
    inner = 1 + part * (tau * with_ + (1 - tau) * without)
    slope = tau * with_ * (system.mean_with[:, None] - X) / system.var_with[:, None]
    slope = slope + (1 - tau) * without * (system.mean_without[:, None] - X) / system.var_without[:, None]
    rest = system.b - (system.A * X).sum(1)
    drift = (part * (X - anchor)).sum(0)
    values = (float(-np.log(inner).sum()), float((weights * rest**2).sum()), float((drift**2).sum()))
    of_x = [-part * slope / inner, -2 * (weights * rest)[:, None] * system.A, 2 * part * drift]
    return values, of_x, -(part * (with_ - without) / inner).sum(0)


@dataclass
class MTAdam:
    """Adam over several losses of one array (Malkiel and Wolf, "MTAdam", EMNLP 2021).

    Each gradient is rescaled to the running norm of the first that is not zero, has its own moments, and is divided by
    the largest of the second moments.
    """

    count: int = 0
    norms: list[float] = field(default_factory=list)
    first: list[Floats] = field(default_factory=list)
    second: list[Floats] = field(default_factory=list)

    def step(self, gradients: list[Floats]) -> Floats:
        """Return what to subtract."""
        now = [float(np.linalg.norm(g)) for g in gradients]
        if not self.count:
            self.norms = now
            self.first = [np.zeros_like(g) for g in gradients]
            self.second = [np.zeros_like(g) for g in gradients]
        else:
            self.norms = [BETAS[2] * old + (1 - BETAS[2]) * new for old, new in zip(self.norms, now, strict=True)]
        self.count += 1
        anchor = next((norm for norm in self.norms if norm > 1e-10), 0.0)
        for i, g in enumerate(gradients):
            scaled = g * (anchor / self.norms[i]) if self.norms[i] > 1e-10 else g
            self.first[i] = BETAS[0] * self.first[i] + (1 - BETAS[0]) * scaled
            self.second[i] = BETAS[1] * self.second[i] + (1 - BETAS[1]) * scaled**2
        largest = np.sqrt(np.maximum.reduce(self.second) / (1 - BETAS[1] ** self.count)) + TINY
        moved: Floats = LR / (1 - BETAS[0] ** self.count) * np.add.reduce(self.first) / largest
        return moved

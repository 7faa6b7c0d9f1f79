"""Whether sums of updates put sites in the order of a property: the default estimate beside the published ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from confrere.audits.audit import Interval, Row
from confrere.audits.property import Floats, System, least_squares, posterior, ridge
from confrere.audits.property_prolin import prolin
from confrere.seeds import numpy_generator

MIXED = 200
"""Participation matrices of a control."""
Estimate = Callable[[System, float], Floats]
ESTIMATES: Mapping[str, tuple[Estimate, int]] = {
    "posterior": (lambda system, prior: posterior(system, prior).mean, MIXED),
    "ridge": (lambda system, prior: ridge(system), MIXED),
    "least squares": (lambda system, prior: least_squares(system), MIXED),
    "PROLIN": (lambda system, prior: prolin(system), 5),
}
"""Each takes a system and the share of sites expected to have the property; and how many times its control is made."""
BOOTSTRAP = 2000


def mixed(system: System, index: int) -> System:
    """Return the system with each round's coefficients dealt out to other sites, drawn at ("mixed", index)."""
    return replace(system, A=numpy_generator(0, "mixed", index).permuted(system.A, axis=1))


def order(estimate: Floats, truth: Floats) -> float:
    """Return the share of pairs of sites, of those that differ in truth (N,), which the estimate (N,) orders rightly.

    Equal estimates count half; 0.5 is guessing, and what no pair gives.
    """
    apart = np.sign(truth[:, None] - truth)
    pairs = apart > 0
    right = np.sign(estimate[:, None] - estimate)[pairs]
    return float((right + 1).mean() / 2) if pairs.any() else 0.5


def order_rows(system: System, prior: float, truth: Floats, seed: int) -> list[Row]:
    """Return one row for each of :data:`ESTIMATES`; control: the same, where others took part in the rounds."""
    rows = []
    for name, (estimate, times) in ESTIMATES.items():
        found = estimate(system, prior)
        others = [order(estimate(mixed(system, i), prior), truth) for i in range(times)]
        ends = np.quantile(others, (0.025, 0.975))
        rows.append(
            Row(
                subject="all",
                model="sums",
                measure=f"order, {name}",
                strength=resampled(lambda rows, found=found: order(found[rows], truth[rows]), len(truth), seed),  # type: ignore[misc]
                control=Interval(float(np.mean(others)), *map(float, ends)),
                chance=0.5,
                n=f"{len(truth)} sites, {len(system.A)} sums",
                main=False,
            )
        )
    return rows


def resampled(measure: Callable[[np.ndarray], float], n: int, seed: int) -> Interval:
    """Return a measure of rows (indices of sites) with a percentile interval over sites; none for fewer than five."""
    value = measure(np.arange(n))
    if n < 5:
        return Interval(value)
    rng = numpy_generator(seed, "audit", "property", "bootstrap")
    drawn = [measure(rng.integers(n, size=n)) for _ in range(BOOTSTRAP)]
    return Interval(value, *(float(q) for q in np.quantile(drawn, (0.025, 0.975))))

"""What noisy steps of a site have cost together: epsilon of all debits, by the tight accountant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from confrere.privacy.accounting import LEAST_SIGMA, dp_accounting, epsilon, interval


def spent(debits: Iterable[Mapping[str, Any]], delta: float) -> float:
    """Return epsilon of all noisy steps, Poisson-sampled, one unit added or removed; 0 for none.

    Args:
        debits: each with ``steps`` >= 0, and ``sigma`` and ``rate`` of these.
        delta: of the guarantee.

    Raises:
        MissingExtraError: dp-accounting is not installed.
    """
    parts = _parts(debits)
    if not parts:
        return 0.0
    if any(sigma == 0 for sigma, _ in parts):
        return math.inf
    if len(parts) == 1:
        ((sigma, rate), steps), *_ = parts.items()
        return epsilon(sigma, rounds=steps, delta=delta, rate=rate)
    if any(sigma < LEAST_SIGMA for sigma, _ in parts):  # no amplification then, for none
        loud = sum(steps / sigma**2 for (sigma, _), steps in parts.items())
        return epsilon(loud**-0.5, rounds=1, delta=delta, sampling="all")
    dp = dp_accounting()
    from dp_accounting.pld import PLDAccountant

    fine = interval(parts.total())
    book = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=fine)
    for (sigma, rate), steps in sorted(parts.items()):
        book.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), steps)
    return float(book.get_epsilon(delta))


def within(debits: Iterable[Mapping[str, Any]], delta: float, limit: float) -> bool:
    """Return whether all debits together cost at most ``limit``; a bound in milliseconds often says so at once."""
    known = list(debits)
    parts = _parts(known)
    if not parts:
        return True
    if len(parts) == 1:
        ((sigma, rate), steps), *_ = parts.items()
        if epsilon(sigma, rounds=steps, delta=delta, rate=rate, accountant="rdp") <= limit:
            return True
    return spent(known, delta) <= limit


def _parts(debits: Iterable[Mapping[str, Any]]) -> Counter[tuple[float, float]]:
    """Return how many steps there were of each noise and rate."""
    parts: Counter[tuple[float, float]] = Counter()
    for debit in debits:
        if debit["steps"] > 0:
            parts[float(debit["sigma"]), float(debit["rate"])] += int(debit["steps"])
    return parts

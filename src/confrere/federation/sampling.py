"""Which sites are asked in a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from confrere.seeds import numpy_generator

Sampling = Literal["fixed", "poisson"]


def cohort_size(fraction: float, sites: int) -> int:
    """Return how many of ``sites`` are asked a round, at least one."""
    return max(1, round(fraction * sites))


def sample(sites: Sequence[str], fraction: float, seed: int, round_: int, sampling: Sampling = "fixed") -> list[str]:
    """Return the sites of a round, sorted; all of them when ``fraction`` is 1.

    ``fixed`` draws :func:`cohort_size` of them. ``poisson`` draws every site by itself with probability ``fraction``,
    so that there may be none; who else can be asked changes nothing for a site. Whoever holds the seed can derive both.
    """
    if sampling == "poisson":
        return sorted(s for s in sites if numpy_generator(seed, "poisson", round_, s).random() < fraction)
    count = cohort_size(fraction, len(sites))
    chosen = numpy_generator(seed, "cohort", round_).permutation(len(sites))[:count]
    return sorted(sites[i] for i in chosen)

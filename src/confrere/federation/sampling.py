"""Which sites are asked in a round."""

from __future__ import annotations

from collections.abc import Sequence

from confrere.seeds import numpy_generator


def cohort_size(fraction: float, sites: int) -> int:
    """Return how many of ``sites`` are asked a round, at least one."""
    return max(1, round(fraction * sites))


def sample(sites: Sequence[str], fraction: float, seed: int, round_: int) -> list[str]:
    """Return the sites of a round, sorted; all of them when ``fraction`` is 1."""
    count = cohort_size(fraction, len(sites))
    chosen = numpy_generator(seed, "cohort", round_).permutation(len(sites))[:count]
    return sorted(sites[i] for i in chosen)

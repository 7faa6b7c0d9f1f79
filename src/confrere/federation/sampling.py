"""Which sites are asked in a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from confrere.choices import FederationChoice
from confrere.errors import ConfigError
from confrere.seeds import numpy_generator

Sampling = Literal["fixed", "poisson", "groups"]


def cohort_size(fraction: float, sites: int) -> int:
    """Return how many of ``sites`` are asked a round, at least one."""
    return max(1, round(fraction * sites))


def sample(
    sites: Sequence[str],
    fraction: float,
    seed: int,
    round_: int,
    sampling: Sampling = "fixed",
    everybody: Sequence[str] | None = None,
) -> list[str]:
    """Return the sites of a round, sorted; all of them when ``fraction`` is 1.

    ``fixed`` draws :func:`cohort_size` of them. ``poisson`` draws every site by itself with probability ``fraction``,
    so that there may be none; who else can be asked changes nothing for a site. ``groups`` asks one of :func:`groups`,
    each once before any is asked again; they are dealt out of ``everybody``, of whom ``sites`` can be asked now: who is
    away moves nobody to another group. Whoever holds the seed can derive all three.
    """
    if sampling == "poisson":
        return sorted(s for s in sites if numpy_generator(seed, "poisson", round_, s).random() < fraction)
    if sampling == "groups":
        dealt = groups(sites if everybody is None else everybody, fraction, seed)
        cycle, place = divmod(round_ - 1, len(dealt))
        asked = dealt[int(numpy_generator(seed, "groups", cycle).permutation(len(dealt))[place])]
        return [site for site in asked if site in sites]
    count = cohort_size(fraction, len(sites))
    chosen = numpy_generator(seed, "cohort", round_).permutation(len(sites))[:count]
    return sorted(sites[i] for i in chosen)


def groups(sites: Sequence[str], fraction: float, seed: int) -> list[list[str]]:
    """Return all sites in fixed groups of :func:`cohort_size`, each sorted; of unequal size where they must be.

    Sums over fixed groups tell nobody's part from those of its group, however many rounds there are: the rank of the
    participation matrix is at most the number of groups (structured selection: So et al., "Securing secure
    aggregation", AAAI 2023).
    """
    names = sorted(sites)
    number = max(1, len(names) // cohort_size(fraction, len(names)))
    order = numpy_generator(seed, "groups").permutation(len(names))
    return [sorted(names[i] for i in order[start::number]) for start in range(number)]


def check_groups(choice: FederationChoice, sites: int, *, threshold: int | None) -> None:
    """Refuse groups that would not protect their members.

    Args:
        choice: of the experiment.
        sites: how many train.
        threshold: of secure aggregation; None without.

    Raises:
        ConfigError: groups of unequal size or of one site; or a group that counts although a member is missing: the
            next sum, with that member, would give it away.
    """
    if choice.sampling != "groups":
        return
    size = cohort_size(choice.fraction, sites)
    fits = [n for n in range(2, sites + 1) if sites % n == 0]
    near = min(fits, key=lambda n: abs(n - size), default=0)
    if near != size:
        what = f"{sites} sites cannot be dealt into equal groups of {size}, with two sites or more in each"
        fix = f"use federation.fraction={near / sites:.6g}" if near else "use federation.sampling=fixed"
        raise ConfigError(what, where="federation.fraction", fix=fix, code="groups")
    wanted = {"federation.min_replies": choice.min_replies}
    wanted |= {} if threshold is None else {"secure.threshold": threshold}
    for key, value in wanted.items():
        if value != size:
            what = "the sum of a part of a group gives away who is missing, once the whole group is summed"
            raise ConfigError(what, where=key, fix=f"use {key}={size}", code="groups")

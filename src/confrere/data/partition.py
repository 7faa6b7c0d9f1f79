"""Deal one pooled set out to simulated sites, by patient and by seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from confrere.data.options import Partition
from confrere.data.paths import check_site_name, slug
from confrere.data.register import number_groups
from confrere.data.sources import Problem, Row
from confrere.errors import DataError
from confrere.seeds import numpy_generator


def deal(
    hashes: Mapping[Row, str], problems: Sequence[Problem], how: Partition, *, seed: int
) -> tuple[dict[Row, str], list[Problem]]:
    """Return the rows with their site filled in; files that cannot be read go to the first site's account."""
    if how.by == "attribute":
        dealt = {replace(row, site=_site_of(row)): digest for row, digest in hashes.items()}
    else:
        groups = number_groups(hashes)
        label_of: dict[int, str] = {}
        for row, digest in sorted(hashes.items(), key=lambda item: (item[1], item[0].label)):
            label_of.setdefault(groups[digest], row.label)
        spread = dirichlet if how.by == "dirichlet" else quantity
        site_of = spread(label_of, n_sites=how.sites, alpha=how.alpha, seed=seed)
        dealt = {replace(row, site=f"site_{site_of[groups[d]] + 1:02d}"): d for row, d in hashes.items()}
    first = min((row.site for row in dealt), default="site_01")
    return dealt, [replace(problem, site=first) for problem in problems]


def _site_of(row: Row) -> str:
    if not row.attribute:
        raise DataError(
            "the column to partition by has an empty cell", fix="fill it, or remove these rows", code="partition"
        )
    return check_site_name(slug(row.attribute))


def dirichlet(label_of: Mapping[int, str], *, n_sites: int, alpha: float, seed: int) -> dict[int, int]:
    """Return group -> site: each class is shared out in proportions drawn from Dirichlet(alpha).

    Hsu et al., Measuring the effects of non-identical data distribution (2019), with patients for images.

    Args:
        label_of: group -> its class.
        n_sites: number of sites.
        alpha: concentration, > 0; small values give sites of few classes.
        seed: the run's seed.

    Raises:
        DataError: fewer groups than sites.
    """
    by_label: dict[str, list[int]] = defaultdict(list)
    for group, label in sorted(label_of.items()):
        by_label[label].append(group)
    site_of: dict[int, int] = {}
    for label, groups in sorted(by_label.items()):
        generator = numpy_generator(seed, "partition", "dirichlet", label)
        shares = generator.dirichlet(np.full(n_sites, alpha))
        site_of |= _cut(groups, shares, generator)
    return _fill(site_of, n_sites)


def quantity(label_of: Mapping[int, str], *, n_sites: int, alpha: float, seed: int) -> dict[int, int]:
    """Return group -> site: classes stay mixed, the numbers of patients follow Dirichlet(alpha)."""
    generator = numpy_generator(seed, "partition", "quantity")
    shares = generator.dirichlet(np.full(n_sites, alpha))
    return _fill(_cut(sorted(label_of), shares, generator), n_sites)


def _cut(groups: list[int], shares: np.ndarray, generator: np.random.Generator) -> dict[int, int]:
    order = generator.permutation(len(groups))
    # A tiny alpha can give shares that are not finite; then one site takes all.
    whole = shares if np.isfinite(shares).all() else np.eye(len(shares))[0]
    ends = np.round(np.cumsum(whole)[:-1] * len(groups)).astype(int)
    return {groups[i]: site for site, part in enumerate(np.split(order, ends)) for i in part.tolist()}


def _fill(site_of: dict[int, int], n_sites: int) -> dict[int, int]:
    """Give every empty site one group of the largest, so that no site starts without a patient."""
    if len(site_of) < n_sites:
        raise DataError(
            f"{len(site_of)} patients cannot be dealt to {n_sites} sites",
            fix="use fewer sites or more patients",
            code="partition",
        )
    members: dict[int, list[int]] = {site: [] for site in range(n_sites)}
    for group, site in sorted(site_of.items()):
        members[site].append(group)
    for site in range(n_sites):
        if not members[site]:
            largest = max(members, key=lambda s: (len(members[s]), -s))
            members[site].append(members[largest].pop())
    return {group: site for site, groups in members.items() for group in groups}

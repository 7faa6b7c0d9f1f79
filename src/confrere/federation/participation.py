"""Who took part in which round, and what sums over such rounds give away of single sites.

With secure aggregation the server sees one sum a round. Over rounds these sums are linear equations in the sites'
contributions: a site whose unit vector lies in the row space of the participation matrix can be told from the others,
if its contribution were the same every round. Where all rows are sums over fixed groups, no single site can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Identifiability:
    """What a participation matrix tells.

    ``rank`` of ``sites``; ``condition``: largest over smallest of the singular values that are not zero (None without
    any round); ``single``: sites whose own contribution follows from the sums, sorted; ``groups``: sites that were
    together in every round, of two or more, each sorted.
    """

    sites: int
    rank: int
    condition: float | None
    single: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]


def cohorts_of(events: Iterable[Mapping[str, Any]]) -> list[tuple[int, tuple[str, ...]]]:
    """Return (round, sites in the sum) of each committed round of a journal that was averaged, in order."""
    rounds = (e for e in events if e["event"] == "round" and e.get("averaged", True) and e["sites"])
    return [(int(e["round"]), tuple(sorted(e["sites"]))) for e in rounds]


def matrix_of(cohorts: Iterable[Sequence[str]], sites: Sequence[str]) -> NDArray[np.float64]:
    """Return the participation matrix (rounds, sites) of 0 and 1; sites that are not in ``sites`` are left out."""
    column = {site: index for index, site in enumerate(sites)}
    rows = [[column[site] for site in cohort if site in column] for cohort in cohorts]
    A = np.zeros((len(rows), len(sites)))
    for row, members in zip(A, rows, strict=True):
        row[members] = 1.0
    return A


def identifiability(A: NDArray[np.float64], sites: Sequence[str]) -> Identifiability:
    """Return what sums with the coefficients ``A`` (rounds, sites) tell of single ``sites``."""
    rows = np.unique(A, axis=0) if A.size else A  # the same group twice says the same twice
    values, right = np.zeros(0), np.zeros((0, len(sites)))
    if rows.size:
        _, values, right = np.linalg.svd(rows, full_matrices=False)
    kept = values > TOLERANCE * max(1.0, float(values.max(initial=0.0)))
    seen = (right[kept] ** 2).sum(0)  # of each site's unit vector, the part within the row space
    column_of: dict[bytes, list[str]] = {}
    for site, column in zip(sites, rows.T, strict=True) if rows.size else ():
        column_of.setdefault(column.tobytes(), []).append(site)
    together = [tuple(sorted(group)) for group in column_of.values() if len(group) > 1]
    return Identifiability(
        sites=len(sites),
        rank=int(kept.sum()),
        condition=float(values[kept].max() / values[kept].min()) if kept.any() else None,
        single=tuple(sorted(site for site, part in zip(sites, seen, strict=True) if part > 1 - 1e-6)),
        groups=tuple(sorted(together)),
    )

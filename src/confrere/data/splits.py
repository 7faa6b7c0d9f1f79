"""Train, validation and test by patient: stratified by class at every site, fixed by the seed alone.

Groups are dealt out from the rarest (site, class) pair to the commonest, each to the split that still lacks
most of that pair: iterative stratification (Sechidis et al., ECML PKDD 2011) on groups instead of single
examples. A patient seen at two sites is one group and so falls in one split everywhere.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confrere.data.cache import write_atomically
from confrere.data.sources import SplitName
from confrere.errors import DataError
from confrere.seeds import derive

TRAIN, VAL, TEST = 0, 1, 2
NAMES: tuple[SplitName, ...] = ("train", "val", "test")
Stratum = tuple[str, int]
# Share of a (site, class) from which one patient's images are many.
_LARGE = 0.05


def assign(members: Mapping[str, Iterable[Stratum]], *, val: float, test: float, seed: int) -> dict[str, int]:
    """Return group -> split (0 train, 1 validation, 2 test).

    Args:
        members: stable group key -> one (site, class) for each of its images.
        val: share for validation of each (site, class), 0 to 0.5.
        test: share for test, 0 to 0.6.
        seed: the run's seed; the order of ``members`` does not matter.

    >>> set(assign({"g": [("a", 0)]}, val=0.2, test=0.2, seed=0).values())
    {0}
    """
    counts = {group: Counter(strata) for group, strata in members.items()}
    groups_of: dict[Stratum, list[str]] = defaultdict(list)
    for group, count in counts.items():
        for stratum in count:
            groups_of[stratum].append(group)
    ticket = {group: derive(seed, "split", group) for group in counts}
    lacking = _targets(counts, np.array([1 - val - test, val, test]))
    result: dict[str, int] = {}
    for stratum in sorted(groups_of, key=lambda s: (len(groups_of[s]), s)):
        order = _order(groups_of[stratum], stratum, counts, ticket)
        has_train = any(result.get(group) == TRAIN for group in order)
        for group in order:
            if group in result:
                continue
            split = TRAIN if not has_train else _neediest(lacking, stratum)
            has_train = has_train or split == TRAIN
            result[group] = split
            for other, n in counts[group].items():
                lacking[other][split] -= n
                lacking[(other[0], -1)][split] -= n
    _repair(counts, ticket, result)
    return result


def _order(
    groups: Iterable[str], stratum: Stratum, counts: Mapping[str, Counter[Stratum]], ticket: Mapping[str, int]
) -> list[str]:
    """Return large groups first (hard to place late), then the rest at random, whatever their sizes."""
    sizes = {group: counts[group][stratum] for group in groups}
    large = sum(sizes.values()) * _LARGE
    return sorted(sizes, key=lambda group: (-sizes[group] if sizes[group] > large else 0, ticket[group]))


def _targets(counts: Mapping[str, Counter[Stratum]], shares: NDArray[np.float64]) -> dict[Stratum, NDArray[np.float64]]:
    """Return the images wanted in each split, by (site, class) and, as class -1, by site."""
    wanted: dict[Stratum, NDArray[np.float64]] = defaultdict(lambda: np.zeros(3))
    for count in counts.values():
        for (site, label), n in count.items():
            wanted[(site, label)] = wanted[(site, label)] + shares * n
            wanted[(site, -1)] = wanted[(site, -1)] + shares * n
    return dict(wanted)


def _neediest(lacking: Mapping[Stratum, NDArray[np.float64]], stratum: Stratum) -> int:
    """Return the split that lacks most of the stratum; ties go to the one its site lacks most."""
    own, site = lacking[stratum].round(6), lacking[(stratum[0], -1)].round(6)
    return max(range(3), key=lambda split: (own[split], site[split], -split))


def _repair(counts: Mapping[str, Counter[Stratum]], ticket: Mapping[str, int], result: dict[str, int]) -> None:
    """Give a site that shares all its patients with others at least one training patient."""
    of_site: dict[str, list[str]] = defaultdict(list)
    for group, count in counts.items():
        for site in {site for site, _ in count}:
            of_site[site].append(group)
    for _, groups in sorted(of_site.items()):
        if all(result[group] != TRAIN for group in groups):
            result[min(groups, key=lambda g: (sum(counts[g].values()), ticket[g]))] = TRAIN


def write_splits(path: Path, rows: Iterable[tuple[str, str, int]]) -> None:
    """Write (site, sha256, split) rows as CSV, in one step, readable by the owner only."""
    text = io.StringIO()
    text.write("site,sha256,split\n")
    for site, digest, split in sorted(rows):
        text.write(f"{site},{digest},{NAMES[split]}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def read_splits(path: Path, expected: Sequence[tuple[str, str]]) -> list[int]:
    """Return the stored split of each expected (site, sha256).

    Raises:
        DataError: the file does not fit the registered images, or holds something else.
    """
    from confrere.data.table import read_rows

    stored: dict[tuple[str, str], int] = {}
    for line, cells in read_rows(path, ["site", "sha256", "split"]):
        if cells["split"] not in NAMES:
            raise DataError(
                f"line {line}: the split is not train, val or test", where=path.name, fix="restore it", code="splits"
            )
        stored[(cells["site"], cells["sha256"])] = NAMES.index(cells["split"])
    new, gone = len(set(expected) - stored.keys()), len(stored.keys() - set(expected))
    if new or gone:
        raise DataError(
            f"the images changed since they were split: {new} new, {gone} gone",
            where=path.name,
            fix="restore the images, or start a new run so that all of them are split afresh",
            code="data-changed",
        )
    return [stored[key] for key in expected]


def check_groups(groups: Sequence[int], splits: Sequence[int], *, where: str) -> None:
    """Refuse a patient in two splits.

    Raises:
        DataError: with the number of such patients.
    """
    seen: dict[int, set[int]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        seen[group].add(split)
    leaks = sum(len(found) > 1 for found in seen.values())
    if leaks:
        raise DataError(
            f"{leaks} patients are in more than one of train, val and test",
            where=where,
            fix="give all pictures of a patient (and copies of a picture) the same split",
            code="splits",
        )

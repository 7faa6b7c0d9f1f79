"""Attacks on anonymised tables, each with the controls that say what its number is worth.

The attacker of both knows the plan and the mapping, as every site does. What succeeds here succeeds in earnest; what
fails here proves nothing about a better attack.

References:
    Ganta, Kasiviswanathan and Smith, KDD 2008 (intersection of releases). Homer et al., PLoS Genetics 2008 (membership
    in a table). Differences: written for this release's form; the intersection also compares items and kept columns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.generalise import Release
from confrere.anonymise.itemsets import published
from confrere.anonymise.mapping import contains
from confrere.anonymise.plan import Plan
from confrere.anonymise.records import Records
from confrere.anonymise.relational import Box
from confrere.anonymise.table import published_items
from confrere.errors import DataError
from confrere.seeds import numpy_generator

LEAST_STRANGERS = 20
"""Of 10 against 10 the area under the curve is 0.5 give or take 0.13 by chance; of fewer it says nothing."""

Look = tuple[int, tuple[int, ...], tuple[str, ...]]
"""How a record looks in a release: class, published items, what is kept."""


@dataclass(frozen=True)
class Target:
    """A release as it is attacked: what is published, and, to score the attack, of whom."""

    plan: Plan
    records: Records
    release: Release

    @cached_property
    def looks(self) -> list[Look]:
        """Return how each record looks."""
        items = published_items(self.plan, self.records, self.release)
        return list(zip(self.release.class_of.tolist(), items, self.records.kept, strict=True))

    @cached_property
    def rows(self) -> dict[int, dict[Look, list[int]]]:
        """Return by class the rows of each look."""
        made: dict[int, dict[Look, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row, look in enumerate(self.looks):
            made[look[0]][look].append(row)
        return made

    @cached_property
    def leaves(self) -> list[int]:
        """Return for each node of the item tree the leaves below it, as bits."""
        tree = self.plan.tree
        if tree is None:
            return []
        return [sum(1 << leaf for leaf in tree.leaves if tree.below[node, leaf]) for node in range(len(tree.nodes))]

    def possible(self, look: Look) -> int:
        """Return the items, as bits, that a record of this look may have."""
        published = own = 0
        for node in self.release.classes[look[0]].items.nodes:
            published |= self.leaves[node]
        for node in look[1]:
            own |= self.leaves[node]
        everything = self.leaves[0] if self.leaves else 0
        return own | (everything & ~published)

    def candidates(self, codes: NDArray[np.int64], known: Sequence[int]) -> list[tuple[Look, list[int]]]:
        """Return looks and rows that fit quasi-identifiers and items that an attacker knows."""
        found = []
        for number, one in enumerate(self.release.classes):
            if contains(self.plan, one.box, codes[None])[0]:
                needed = set(published(self.plan.tree, one.items.nodes, known))
                found += [(look, rows) for look, rows in self.rows[number].items() if needed <= set(look[1])]
        return found


def intersection(here: Target, there: Target, *, most: int = 200, seed: int = 0) -> dict[str, Any] | None:
    """Return what a second release gives away about those who are in both; None where nobody is.

    The attacker knows a person's quasi-identifiers and m items, and that the person is in both tables. Of the rows of
    ``here`` that fit, those stay that have a row of ``there`` which fits, too, and may be the same record: overlapping
    boxes, items that one record can have, equal target and kept columns.

    Args:
        here: the table in which a row is looked for.
        there: another site's, or another release of the same site; units of both are numbered alike.
        most: persons attacked, drawn at random.
        seed: of the draw.

    Returns:
        ``persons``, and for ``both`` tables, ``alone`` (control: ``here`` only) and ``stranger`` (control: ``there``
        is searched for somebody else): ``pointed``, the chance to point at the person's own row when one of those left
        is drawn; ``below_k``, the share of persons whose own row is left among those of fewer than k units; ``told``,
        the share whose target is told because all rows that are left have it.
    """
    rng = numpy_generator(seed, "intersection")
    mine, theirs = (
        dict(zip(t.records.units[::-1].tolist(), range(len(t.records))[::-1], strict=True)) for t in (here, there)
    )
    shared = sorted(set(mine) & set(theirs))
    if not shared:
        return None
    chosen = [shared[at] for at in rng.permutation(len(shared))[:most]]
    scores: dict[str, list[tuple[float, bool, bool]]] = {"both": [], "alone": [], "stranger": []}
    for unit in chosen:
        row = mine[unit]
        codes, known = _knowledge(here, row, rng)
        fits = here.candidates(codes, known)
        scores["alone"].append(_score(here, fits, row))
        other = int(rng.integers(len(there.records)))
        for name, at in (("both", theirs[unit]), ("stranger", other)):
            second = there.candidates(
                there.records.codes[at], known if name == "both" else _knowledge(there, at, rng)[1]
            )
            scores[name].append(_score(here, _surviving(here, there, fits, second), row))
    told: dict[str, Any] = {"persons": len(chosen), "shared": len(shared)}
    for name, found in scores.items():
        means = np.array(found, dtype=np.float64).mean(0)
        told[name] = dict(zip(("pointed", "below_k", "told"), map(float, means), strict=True))
    return told


def _knowledge(target: Target, row: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], list[int]]:
    """Return a row's quasi-identifiers and up to m of its items, drawn at random."""
    items = target.records.items[row]
    known = rng.permutation(len(items))[: target.plan.m]
    return target.records.codes[row], [items[at] for at in known]


def _surviving(
    here: Target, there: Target, fits: list[tuple[Look, list[int]]], second: list[tuple[Look, list[int]]]
) -> list[tuple[Look, list[int]]]:
    alike: dict[tuple[str, ...], list[Look]] = defaultdict(list)
    for look, _ in second:
        alike[look[2]].append(look)
    return [
        (look, rows) for look, rows in fits if any(_same(here, look, there, other) for other in alike.get(look[2], ()))
    ]


def _same(here: Target, look: Look, there: Target, other: Look) -> bool:
    """Return whether two rows may be of one record."""
    if not _overlap(here.plan, here.release.classes[look[0]].box, there.release.classes[other[0]].box):
        return False
    one, two = here.possible(look), there.possible(other)
    return all(here.leaves[node] & two for node in look[1]) and all(there.leaves[node] & one for node in other[1])


def _overlap(plan: Plan, one: Box, other: Box) -> bool:
    numeric = len(plan.numeric)
    if any(a[0] > b[1] or b[0] > a[1] for a, b in zip(one[:numeric], other[:numeric], strict=True)):
        return False
    trees = zip(plan.categorical.values(), one[numeric:], other[numeric:], strict=True)
    return all(tree.below[a[0], b[0]] or tree.below[b[0], a[0]] for tree, a, b in trees)


def _score(here: Target, left: list[tuple[Look, list[int]]], row: int) -> tuple[float, bool, bool]:
    rows = [one for _, members in left for one in members]
    units = {int(here.records.units[one]) for one in rows}
    told = {here.records.kept[one][0] for one in rows} == {here.records.kept[row][0]}
    return (1.0 / len(rows) if row in rows else 0.0), row in rows and len(units) < here.plan.k, told


def check_strangers(strangers: Records, where: str) -> None:
    """Raise DataError where there are too few strangers for a control to say anything."""
    if len(strangers) < LEAST_STRANGERS:
        what = f"the table of strangers is too short for a comparison: {len(strangers)}"
        fix = f"give {LEAST_STRANGERS} or more, or leave out --strangers"
        raise DataError(what, where=where, fix=fix, code="too-few-records")


def membership(target: Target, members: Records, strangers: Records, *, seed: int = 0) -> dict[str, float]:
    """Return how well a table tells those in it from others of the same population.

    The attacker knows whole records. Score of a record: how many rows it may be, each divided by how many kinds of
    records its class's box holds. Area under the ROC curve: 0.5 is chance.

    Args:
        target: the anonymised table.
        members: records of it.
        strangers: records that are not in it, at least ``LEAST_STRANGERS``, read by the same plan.
        seed: of the split of the second control.

    Returns:
        ``anonymised``; ``raw``: control, the table before (a record is in it, or not); ``strangers``: control,
        one half of them against the other.

    Raises:
        DataError: there are too few strangers.
    """
    from sklearn.metrics import roc_auc_score

    check_strangers(strangers, "strangers")
    inside, outside = _scores(target, members), _scores(target, strangers)
    seen = Counter(_whole(target.records))
    exact = [[float(seen[one]) for one in _whole(records)] for records in (members, strangers)]
    order = numpy_generator(seed, "strangers").permutation(len(strangers))
    halves = outside[order[: len(order) // 2]], outside[order[len(order) // 2 :]]

    def area(above: Sequence[float], below: Sequence[float]) -> float:
        truth = [1] * len(above) + [0] * len(below)
        return float(roc_auc_score(truth, [*above, *below]))

    return {
        "anonymised": area(inside.tolist(), outside.tolist()),
        "raw": area(*exact),
        "strangers": area(halves[0].tolist(), halves[1].tolist()),
    }


def _whole(records: Records) -> list[tuple[Any, ...]]:
    return list(zip(map(tuple, records.codes.tolist()), records.items, records.kept, strict=True))


def _scores(target: Target, records: Records) -> NDArray[np.float64]:
    plan, made = target.plan, np.zeros(len(records))
    for number, one in enumerate(target.release.classes):
        kinds = 1.0
        for low, high in one.box[: len(plan.numeric)]:
            kinds *= high - low + 1
        for (node, _), tree in zip(one.box[len(plan.numeric) :], plan.categorical.values(), strict=True):
            kinds *= float(tree.below[node, list(tree.leaves)].sum())
        for row in np.flatnonzero(contains(plan, one.box, records.codes)).tolist():
            look = (number, published(plan.tree, one.items.nodes, records.items[row]), records.kept[row])
            made[row] += len(target.rows[number].get(look, ())) / kinds
    return made

"""(k, k^m)-anonymity of one site's table: classes, then their item sets, then fewer classes for the items' sake.

References:
    Poulis, Loukides, Gkoulalas-Divanis and Skiadopoulos, ECML PKDD 2013 (relational and transactional attributes
    together; form classes, then merge them). Choudhury et al., ECAI 2020 (its use in federated learning). Their merge
    orders and thresholds are not public in full; this is a design of our own.
    Differences: classes come from strict partitioning; items are generalised in a public tree, so that classes of all
    sites are encoded alike; the loss of items is NCP, not a count of subsets; the class whose items lose most is merged
    with that of its nearest neighbours with which both losses together are least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.itemsets import Published, protect
from confrere.anonymise.plan import Plan
from confrere.anonymise.records import Records
from confrere.anonymise.relational import Box, Rows, join, ncp, partition
from confrere.errors import DataError

_NEIGHBOURS = 4


@dataclass(frozen=True)
class Class:
    """Records that share all they publish of their quasi-identifiers.

    Attributes:
        box: what they share.
        rows: which records they are.
        items: what is published of their items.
    """

    box: Box
    rows: Rows
    items: Published


@dataclass(frozen=True)
class Release:
    """An anonymised table in codes: ``class_of[i]`` is the class of record i; ``classes`` in the order of boxes."""

    classes: tuple[Class, ...]
    class_of: NDArray[np.int64]


def anonymise(plan: Plan, records: Records, *, where: str = "table") -> Release:
    """Return classes of at least ``plan.k`` units whose item sets hold k^m.

    Raises:
        DataError: the table has fewer than k units.
    """
    units = len(np.unique(records.units))
    if units < plan.k:
        raise DataError(
            f"the table has {units:,} {plan.unit}, fewer than k = {plan.k:,}",
            where=where,
            fix="lower k, or join tables",
            code="too-few-records",
        )
    work = {box: _class(plan, records, box, rows) for box, rows in partition(plan, records).items()}
    if plan.tree is not None:
        _merge(plan, records, work)
    ordered = tuple(work[box] for box in sorted(work))
    class_of = np.empty(len(records), dtype=np.int64)
    for number, one in enumerate(ordered):
        class_of[one.rows] = number
    return Release(ordered, class_of)


def losses(plan: Plan, records: Records, release: Release) -> dict[str, float]:
    """Return GCP of each quasi-identifier, of all (``identifiers``), and of items (``items``), 0 to 1 each."""
    weights = np.array([len(one.rows) for one in release.classes]) / len(records)
    each = np.array([ncp(plan, one.box) for one in release.classes])
    made = dict(zip(plan.identifiers, (weights @ each).tolist(), strict=True))
    made = {f"identifier {name}": value for name, value in made.items()} | {
        "identifiers": float(weights @ each.mean(1))
    }
    occurrences = sum(map(len, records.items))
    if plan.tree is not None:
        made["items"] = sum(one.items.lost for one in release.classes) / occurrences if occurrences else 0.0
    return made


def _class(plan: Plan, records: Records, box: Box, rows: Rows) -> Class:
    if plan.tree is None:
        return Class(box, rows, Published((), 0.0))
    items = [records.items[row] for row in rows]
    return Class(box, rows, protect(plan.tree, items, records.units[rows], k=plan.k, m=plan.m))


def _merge(plan: Plan, records: Records, work: dict[Box, Class]) -> None:
    """Merge classes while their quasi-identifiers lose less than ``plan.merge_until`` and items gain by it."""
    total = max(1, sum(map(len, records.items)))
    lost = {box: float(ncp(plan, box).mean()) * len(one.rows) / len(records) for box, one in work.items()}
    settled: set[Box] = set()
    while True:
        open_ = [box for box, one in work.items() if box not in settled and one.items.lost > 0]
        if len(work) < 2 or not open_ or sum(lost.values()) >= plan.merge_until:
            return
        worst = max(open_, key=lambda box: (work[box].items.lost / len(work[box].rows), box))
        best = _best(plan, records, work, worst, total)
        if best is None:
            settled.add(worst)
            continue
        for box in best[1]:
            del work[box], lost[box]
            settled.discard(box)
        work[best[0].box] = best[0]
        lost[best[0].box] = float(ncp(plan, best[0].box).mean()) * len(best[0].rows) / len(records)


def _best(
    plan: Plan, records: Records, work: dict[Box, Class], worst: Box, total: int
) -> tuple[Class, list[Box]] | None:
    """Return the class that ``worst`` and a neighbour become, and what it replaces; None where no merge gains."""
    one, tried = work[worst], []
    for box in _nearest(plan, work, worst):
        whole = join(plan, worst, box)
        gone = [known for known in {worst, box, whole} if known in work]  # the joint box may be a class already
        rows = np.sort(np.concatenate([work[known].rows for known in gone]))
        made = _class(plan, records, whole, rows)
        before = sum(float(ncp(plan, known).mean()) * len(work[known].rows) for known in gone)
        wider = (float(ncp(plan, whole).mean()) * len(rows) - before) / len(records)
        clearer = (sum(work[known].items.lost for known in gone) - made.items.lost) / total
        gain = plan.items_weight * clearer - (1.0 - plan.items_weight) * wider
        tried.append((gain, made, gone))
    found = max(tried, key=lambda entry: (entry[0], entry[1].box)) if tried and len(one.rows) else None
    return (found[1], found[2]) if found is not None and found[0] > 0 else None


def _nearest(plan: Plan, work: dict[Box, Class], worst: Box) -> list[Box]:
    """Return the boxes whose union with ``worst`` adds least loss to the records of both."""
    boxes = [box for box in work if box != worst]
    sizes = np.array([len(work[box].rows) for box in boxes])
    low, high = (np.array([[pair[side] for pair in box] for box in boxes]) for side in (0, 1))
    own, joint = np.zeros(len(boxes)), np.zeros(len(boxes))
    for q, name in enumerate(plan.identifiers):
        first, last = worst[q]
        if name in plan.numeric:
            cuts = np.array(plan.numeric[name])
            span = cuts[-1] - cuts[0]
            own += (cuts[high[:, q] + 1] - cuts[low[:, q]]) / span
            joint += (cuts[np.maximum(high[:, q], last) + 1] - cuts[np.minimum(low[:, q], first)]) / span
        else:
            tree = plan.categorical[name]
            own += tree.ncp[low[:, q]]
            joint += tree.ncp[tree.common[low[:, q], first]]
    mine = float(ncp(plan, worst).sum())
    size = len(work[worst].rows)
    added = (joint - own) * sizes + (joint - mine) * size
    return [boxes[at] for at in np.lexsort((np.arange(len(boxes)), added))[:_NEIGHBOURS]]

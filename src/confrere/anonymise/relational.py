"""Classes of quasi-identifiers: strict partitioning of records, and what a class loses.

A box has a pair for each quasi-identifier: first and last bin of a numeric one, twice the node of a categorical one.
NCP of a numeric pair is the width between its public cut points over the public range, of a node see
:mod:`confrere.anonymise.hierarchy`. A box's NCP is the mean over quasi-identifiers; a table's GCP is the mean over
records, 0 to 1.

References:
    LeFevre, DeWitt and Ramakrishnan, ICDE 2006 (Mondrian). Xu et al., KDD 2006 (NCP). Ghinita et al., VLDB 2007 (GCP).
    Differences: every cut between bins is tried, from the most even on, and a box shrinks to what lies in it but no
    further than to public cut points; a part of a tree is split into those of its children that hold k units, while the
    others stay together under the parent.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.plan import Plan
from confrere.anonymise.records import Records

Rows = NDArray[np.int64]
Box = tuple[tuple[int, int], ...]


def distinct(records: Records, rows: Rows) -> int:
    """Return how many units the rows are of."""
    return len(np.unique(records.units[rows]))


def box_of(plan: Plan, records: Records, rows: Rows) -> Box:
    """Return the smallest box that holds ``rows``."""
    codes = records.codes[rows]
    pairs = [(int(codes[:, q].min()), int(codes[:, q].max())) for q in range(len(plan.numeric))]
    for q, tree in enumerate(plan.categorical.values(), len(plan.numeric)):
        pairs.append((tree.join(np.unique(codes[:, q]).tolist()),) * 2)
    return tuple(pairs)


def ncp(plan: Plan, box: Box) -> NDArray[np.float64]:
    """Return (Q,) the loss of every quasi-identifier in a box, 0 to 1."""
    lost = []
    for (low, high), cuts in zip(box, plan.numeric.values(), strict=False):
        lost.append((cuts[high + 1] - cuts[low]) / (cuts[-1] - cuts[0]))
    for (node, _), tree in zip(box[len(plan.numeric) :], plan.categorical.values(), strict=True):
        lost.append(float(tree.ncp[node]))
    return np.array(lost)


def join(plan: Plan, one: Box, other: Box) -> Box:
    """Return the smallest box that holds both."""
    numeric = len(plan.numeric)
    pairs = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one[:numeric], other[:numeric], strict=True)]
    trees = zip(one[numeric:], other[numeric:], plan.categorical.values(), strict=True)
    return (*pairs, *((int(tree.common[a[0], b[0]]),) * 2 for a, b, tree in trees))


def partition(plan: Plan, records: Records) -> dict[Box, Rows]:
    """Return classes of at least ``plan.k`` units each, by box; the table must have that many."""
    made: dict[Box, Rows] = {}
    waiting = [np.arange(len(records))]
    while waiting:
        rows = waiting.pop()
        box = box_of(plan, records, rows)
        parts = _split(plan, records, rows, box)
        if parts:
            waiting.extend(parts)
        else:
            made[box] = np.sort(np.concatenate([made.get(box, np.empty(0, np.int64)), rows]))
    return made


def _split(plan: Plan, records: Records, rows: Rows, box: Box) -> list[Rows]:
    """Return two or more parts with k units each, along the quasi-identifier that loses most and can be split."""
    if len(rows) < 2 * plan.k:
        return []
    for q in np.argsort(-ncp(plan, box), kind="stable"):
        codes = records.codes[rows, q]
        if q < len(plan.numeric):
            for low in _cuts(codes):
                parts = [rows[low], rows[~low]]
                if all(distinct(records, part) >= plan.k for part in parts):
                    return parts
        else:
            parts = _branches(plan, records, rows, int(q), box[q][0])
            if len(parts) > 1:
                return parts
    return []


def _cuts(codes: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
    """Yield which rows lie below each cut between bins that are there, the most even cut first."""
    bins, counts = np.unique(codes, return_counts=True)
    below = np.cumsum(counts)[:-1]
    for cut in np.argsort(np.abs(2 * below - len(codes)), kind="stable"):
        yield codes <= bins[cut]


def _branches(plan: Plan, records: Records, rows: Rows, q: int, node: int) -> list[Rows]:
    """Return the rows of each child of ``node`` with k units, and those of all others together, if they have k too."""
    tree = list(plan.categorical.values())[q - len(plan.numeric)]
    codes = records.codes[rows, q]
    child = {leaf: tree.child(node, leaf) for leaf in np.unique(codes).tolist()}
    by_child: dict[int, Rows] = {}
    for one in sorted(set(child.values())):
        by_child[one] = rows[np.isin(codes, [leaf for leaf in child if child[leaf] == one])]
    large = {one: part for one, part in by_child.items() if distinct(records, part) >= plan.k}
    rest = [part for one, part in by_child.items() if one not in large]
    while rest and large and distinct(records, np.concatenate(rest)) < plan.k:
        smallest = min(large, key=lambda one: (len(large[one]), one))
        rest.append(large.pop(smallest))
    return [*large.values(), *([np.sort(np.concatenate(rest))] if rest else [])]

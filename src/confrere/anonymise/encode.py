"""Numbers for a model, the same columns at every site, of records in the clear and of anonymised ones.

A numeric identifier is where it lies in its public range, 0 to 1, a box its mid-point. A categorical one is a column a
leaf: the chance of the leaf where only the node is known, all leaves below it alike. Items are a column a leaf, too: 1,
or the chance under the published node. Mid-points and equal chances, not means of records: a mean over few patients
would tell about them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.plan import Plan
from confrere.anonymise.records import Records
from confrere.anonymise.relational import Box


def feature_names(plan: Plan, *, items: bool = True) -> list[str]:
    """Return the names of the columns: ``age``, ``race=White``, ``diagnoses:250``."""
    names = list(plan.numeric)
    for name, tree in plan.categorical.items():
        names += [f"{name}={tree.nodes[leaf]}" for leaf in tree.leaves]
    if items and plan.tree is not None:
        names += [f"{plan.items}:{plan.tree.nodes[leaf]}" for leaf in plan.tree.leaves]
    return names


def encode(plan: Plan, boxes: Sequence[Box] | None, records: Records | None) -> NDArray[np.float64]:
    """Return (N, F) the quasi-identifiers of ``boxes``, or those of ``records`` in the clear."""
    columns = []
    low = np.array([[pair[0] for pair in box] for box in boxes]) if boxes is not None else None
    high = np.array([[pair[1] for pair in box] for box in boxes]) if boxes is not None else None
    for q, cuts in enumerate(plan.numeric.values()):
        at = np.array(cuts)
        if low is not None and high is not None:
            values = (at[low[:, q]] + at[high[:, q] + 1]) / 2.0
        elif records is not None:
            values = records.numbers[:, q]
        columns.append(((values - at[0]) / (at[-1] - at[0]))[:, None])
    for q, tree in enumerate(plan.categorical.values(), len(plan.numeric)):
        nodes = low[:, q] if low is not None else records.codes[:, q] if records is not None else np.empty(0, np.int64)
        columns.append(tree.share[nodes])
    return np.concatenate(columns, axis=1)


def encode_items(plan: Plan, sets: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Return (N, leaves) of published nodes, or of leaves in the clear; (N, 0) without items."""
    if plan.tree is None:
        return np.zeros((len(sets), 0))
    made = np.zeros((len(sets), len(plan.tree.leaves)))
    for row, nodes in enumerate(sets):
        for node in nodes:
            made[row] = np.maximum(made[row], plan.tree.share[node])
    return made

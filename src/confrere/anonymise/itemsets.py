"""k^m for the item sets of one class: no set of up to m items is had by between 1 and k - 1 units.

An item is published as a node above it, the same for all records of the class, or not at all. The published nodes of a
class cover no leaf twice, so what an attacker knows of a record, up to m leaves, is up to m nodes: if every set of up
to m nodes that occurs is had by k units, the knowledge fits k of them (Terrovitis, Mamoulis and Kalnis, PVLDB 2008).

Loss: the mean over all items of all records of NCP(published node), 1 where an item is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.hierarchy import Hierarchy


@dataclass(frozen=True)
class Published:
    """The item sets of one class.

    Attributes:
        nodes: what is published, ascending; together they cover no leaf twice.
        lost: sum of NCP over all items of all records, 1 for one that is left out.
    """

    nodes: tuple[int, ...]
    lost: float


def published(tree: Hierarchy | None, nodes: Iterable[int], leaves: Iterable[int]) -> tuple[int, ...]:
    """Return those of ``nodes`` that cover one of ``leaves``, ascending; a leaf that none covers is left out."""
    if tree is None:
        return ()
    chosen, found = set(nodes), set()
    for leaf in leaves:
        node = leaf
        while node not in chosen and node != 0:
            node = tree.parent[node]
        if node in chosen:
            found.add(node)
    return tuple(sorted(found))


def protect(tree: Hierarchy, items: Sequence[Sequence[int]], units: NDArray[np.int64], *, k: int, m: int) -> Published:
    """Return what a class may publish of its items.

    Greedy: as long as some set of up to m published nodes is had by too few units, one of its nodes is raised to its
    parent, which swallows all that is published below, or left out; of all these steps the one that costs least.

    Args:
        tree: of the items.
        items: leaves of every record.
        units: of every record.
        k: units that share whatever is published.
        m: items an attacker may know.
    """
    slot = _slots(units)
    holders: dict[int, int] = {}
    count: dict[int, int] = {}
    for position, leaves in zip(slot.of_row, items, strict=True):
        for leaf in leaves:
            holders[leaf] = holders.get(leaf, 0) | 1 << position
            count[leaf] = count.get(leaf, 0) + 1
    state = {leaf: frozenset([leaf]) for leaf in holders}
    masks = dict(holders)
    while (rare := _rare(masks, slot, k, m)) is not None:
        _, _, node, raised = min(_steps(tree, rare, state, count))
        if raised:
            node = tree.parent[node]
            covered = tree.covers[node]
            leaves_below = covered & holders.keys()
            for gone in covered & state.keys():
                del state[gone], masks[gone]
            state[node] = leaves_below
            masks[node] = _any(holders, leaves_below)
        else:
            del state[node], masks[node]
    kept = math.fsum(count[leaf] * (1.0 - tree.penalty[node]) for node, leaves in state.items() for leaf in leaves)
    return Published(tuple(sorted(state)), float(sum(count.values()) - kept))


def _steps(
    tree: Hierarchy, rare: Iterable[int], state: Mapping[int, frozenset[int]], count: Mapping[int, int]
) -> Iterable[tuple[float, int, int, bool]]:
    """Yield cost, what breaks ties, node and whether it is raised (else left out), for each node of a rare set."""
    for node in rare:
        yield sum(count[leaf] for leaf in state[node]) * (1.0 - tree.penalty[node]), 1, node, False
        parent = tree.parent[node]
        if parent != 0:  # "some item" says nothing
            covered = tree.covers[parent]
            # fsum: the same in whatever order sets are gone through
            told = math.fsum(
                (1.0 - tree.penalty[known]) * count[leaf] for known in covered & state.keys() for leaf in state[known]
            )
            still = sum(count[leaf] for leaf in covered & count.keys()) * (1.0 - tree.penalty[parent])
            yield told - still, 0, node, True


def _any(holders: Mapping[int, int], leaves: Iterable[int]) -> int:
    mask = 0
    for leaf in leaves:
        mask |= holders[leaf]
    return mask


@dataclass(frozen=True)
class _Slots:
    """Rows as bits: the n-th record of each unit stands in the n-th block of bits, one bit a unit."""

    of_row: list[int]
    width: int
    blocks: int

    def units(self, rows: int) -> int:
        """Return how many units have a row among ``rows``."""
        if self.blocks == 1:
            return rows.bit_count()
        found, block = 0, (1 << self.width) - 1
        while rows:
            found |= rows & block
            rows >>= self.width
        return found.bit_count()


def _slots(units: NDArray[np.int64]) -> _Slots:
    number: dict[int, int] = {}
    seen: dict[int, int] = {}
    placed = []
    for unit in units.tolist():
        number.setdefault(unit, len(number))
        placed.append((number[unit], seen.get(unit, 0)))
        seen[unit] = seen.get(unit, 0) + 1
    width = len(number)
    return _Slots([at + nth * width for at, nth in placed], width, max(seen.values(), default=0))


def _rare(masks: Mapping[int, int], slots: _Slots, k: int, m: int) -> tuple[int, ...] | None:
    """Return a smallest set of up to ``m`` nodes that some record has, and fewer than ``k`` units have."""
    nodes = sorted(masks, key=lambda node: (masks[node].bit_count(), node))
    for size in range(1, m + 1):
        found = _search((), -1, nodes, 0, masks, slots, k, size)
        if found is not None:
            return found
    return None


def _search(
    chosen: tuple[int, ...],
    rows: int,
    nodes: Sequence[int],
    start: int,
    masks: Mapping[int, int],
    slots: _Slots,
    k: int,
    size: int,
) -> tuple[int, ...] | None:
    for index in range(start, len(nodes)):
        left = masks[nodes[index]] & rows
        if not left:
            continue
        now = (*chosen, nodes[index])
        if len(now) == size:
            if slots.units(left) < k:
                return now
        elif (found := _search(now, left, nodes, index + 1, masks, slots, k, size)) is not None:
            return found
    return None

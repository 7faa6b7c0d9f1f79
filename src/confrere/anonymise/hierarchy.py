"""Public trees of values: what a value may be generalised to, and how much that loses.

Nodes are numbered; the root is node 0 and covers every leaf. NCP(node) = leaves below / leaves of the tree, 0 for a
leaf and 1 for the root (normalised certainty penalty; Xu et al., KDD 2006).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ROOT = "*"
MOST_LEAVES, MOST_NODES = 1_000, 2_500


@dataclass(frozen=True)
class Hierarchy:
    """A tree.

    Attributes:
        nodes: name of every node; ``nodes[0]`` is ``*``.
        parent: parent of every node, always an earlier one; the root is its own.
    """

    nodes: tuple[str, ...]
    parent: tuple[int, ...]

    @cached_property
    def number(self) -> dict[str, int]:
        """Return node by name."""
        return {name: node for node, name in enumerate(self.nodes)}

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Return the nodes that are no parent, in order."""
        inner = set(self.parent[1:])
        return tuple(node for node in range(len(self.nodes)) if node not in inner)

    @cached_property
    def leaf(self) -> dict[str, int]:
        """Return leaf by name."""
        return {self.nodes[node]: node for node in self.leaves}

    @cached_property
    def below(self) -> NDArray[np.bool_]:
        """Return (nodes, nodes): whether the second is the first or lies below it."""
        made = np.eye(len(self.nodes), dtype=bool)
        for node in range(len(self.nodes) - 1, 0, -1):
            made[self.parent[node]] |= made[node]
        return made

    @cached_property
    def covers(self) -> tuple[frozenset[int], ...]:
        """Return for every node itself and the nodes below it."""
        return tuple(frozenset(np.flatnonzero(row).tolist()) for row in self.below)

    @cached_property
    def penalty(self) -> tuple[float, ...]:
        """Return :attr:`ncp` as plain numbers."""
        return tuple(self.ncp.tolist())

    @cached_property
    def share(self) -> NDArray[np.float64]:
        """Return (nodes, leaves): the chance of every leaf where only the node is known, all leaves alike."""
        covered = self.below[:, list(self.leaves)].astype(np.float64)
        made: NDArray[np.float64] = covered / covered.sum(1, keepdims=True)
        return made

    @cached_property
    def ncp(self) -> NDArray[np.float64]:
        """Return the normalised certainty penalty of every node, 0 to 1."""
        count = self.below[:, list(self.leaves)].sum(1)
        made: NDArray[np.float64] = np.where(count > 1, count / len(self.leaves), 0.0)
        return made

    @cached_property
    def common(self) -> NDArray[np.int64]:
        """Return (nodes, nodes): the lowest node above both."""
        # Children come after parents: the last node that lies above both is the lowest.
        above = self.below.T
        size = len(self.nodes)
        made = np.empty((size, size), dtype=np.int64)
        for node in range(size):
            both = above & above[node]
            made[node] = size - 1 - np.argmax(both[:, ::-1], axis=1)
        return made

    def join(self, nodes: Iterable[int]) -> int:
        """Return the lowest node above all of ``nodes``, of which there is at least one."""
        found = -1
        for node in nodes:
            found = node if found < 0 else int(self.common[found, node])
        return found

    def child(self, node: int, leaf: int) -> int:
        """Return the child of ``node`` that is above ``leaf``, or ``leaf`` if that is the node."""
        while leaf != node and self.parent[leaf] != node:
            leaf = self.parent[leaf]
        return leaf


def grow(paths: Sequence[Sequence[str]]) -> Hierarchy:
    """Return the tree of ``paths``: each a value and what it generalises to, step by step; a last ``*`` may be missing.

    A step that repeats the one before is skipped, so that branches may differ in depth.

    Raises:
        ValueError: a name in two places, a value that is also a group, no or too many values. The text quotes none.
    """
    if not 1 < len(paths) <= MOST_LEAVES:
        raise ValueError(f"it has {len(paths)} values, 2 to {MOST_LEAVES:,} are possible")
    names, parents = [ROOT], [0]
    number = {ROOT: 0}
    for line, path in enumerate(paths, 1):
        steps = [step for step in dict.fromkeys(path) if step != ROOT]
        if not steps or not all(steps):
            raise ValueError(f"line {line} has an empty name, or none")
        node = 0
        for depth, step in enumerate(reversed(steps), 1):
            known = number.get(step)
            if known is None:
                known = number[step] = len(names)
                names.append(step)
                parents.append(node)
            elif parents[known] != node or depth == len(steps):
                raise ValueError(f"line {line} puts a name in a second place, or names a value twice")
            node = known
    tree = Hierarchy(tuple(names), tuple(parents))
    if len(names) > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES:,} names")
    if len(tree.leaves) != len(paths):
        raise ValueError("a value is also a group")
    return tree

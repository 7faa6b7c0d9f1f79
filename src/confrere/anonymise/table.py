"""Anonymised records as cells, and the check of what is written, by counting cells alone.

:func:`examine` knows nothing of how classes were made: it groups equal rows and counts.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.generalise import Release
from confrere.anonymise.itemsets import published
from confrere.anonymise.plan import Plan
from confrere.anonymise.records import Records
from confrere.anonymise.relational import Box
from confrere.data.paths import fit_for_csv
from confrere.errors import DataError

MOST_SETS = 50_000_000
_NUMBER = re.compile(r"[+-][\d.,]*([eE][+-]?\d+)?")  # with its sign, or the sign alone: neither is run


def published_items(plan: Plan, records: Records, release: Release) -> list[tuple[int, ...]]:
    """Return for each record the published nodes of its items."""
    pairs = zip(records.items, release.class_of.tolist(), strict=True)
    return [published(plan.tree, release.classes[number].items.nodes, leaves) for leaves, number in pairs]


def cells(plan: Plan, box: Box, nodes: Sequence[int], kept: Sequence[str]) -> tuple[str, ...]:
    """Return a record's cells in the order of ``plan.written``: ``20..35``, a node's name, ``a;b``, what is kept.

    Cut points are the shortest numbers that read back the same. What is kept is no formula to a spreadsheet.
    """
    pairs = zip(plan.numeric.values(), box, strict=False)
    made = [f"{_shortest(cuts[low])}..{_shortest(cuts[high + 1])}" for cuts, (low, high) in pairs]
    trees = zip(plan.categorical.values(), box[len(plan.numeric) :], strict=True)
    made += [tree.nodes[node] for tree, (node, _) in trees]
    if plan.tree is not None:
        made.append(plan.separator.join(sorted(plan.tree.nodes[node] for node in nodes)))
    return (*made, *map(_safe, kept[1:]), _safe(kept[0]))


def _shortest(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _safe(cell: str) -> str:
    return cell if not cell or _NUMBER.fullmatch(cell) else fit_for_csv(cell)


def rows_of(plan: Plan, records: Records, release: Release) -> list[tuple[str, ...]]:
    """Return the cells of all records, in the order of ``records``."""
    items = published_items(plan, records, release)
    boxes = [release.classes[number].box for number in release.class_of]
    return [cells(plan, *one) for one in zip(boxes, items, records.kept, strict=True)]


def as_csv(plan: Plan, rows: Sequence[tuple[str, ...]]) -> bytes:
    """Return a CSV; rows are sorted, as the order they came in may tell who is who."""
    return csv_bytes(plan.written, sorted(rows))


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """Return a CSV in UTF-8."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def check_size(plan: Plan, records: Records, where: str) -> None:
    """Raise DataError where counting sets of up to m items would not end in reasonable time."""
    sizes = Counter(map(len, records.items))
    sets = sum(count * _subsets(size, plan.m) for size, count in sizes.items())
    if sets > MOST_SETS:
        what, fix = f"{sets:,} sets of up to {plan.m} items are to be counted", "lower m, or take fewer items a record"
        raise DataError(what, where=where, fix=fix, code="too-many-items")


def _subsets(size: int, m: int) -> int:
    found = chosen = 1
    for n in range(1, min(size, m) + 1):
        chosen = chosen * (size - n + 1) // n
        found += chosen
    return found - 1


def examine(plan: Plan, rows: Sequence[tuple[str, ...]], units: NDArray[np.int64]) -> dict[str, Any]:
    """Return what counting says of a table that is about to be written.

    Args:
        plan: which columns there are, k and m.
        rows: cells of every record.
        units: of every record.

    Returns:
        ``classes``; ``smallest_class``: units in it; ``smallest_support``: least number of units that have a set of up
        to m items in one class, None where no item is published; ``holds``: whether both are at least k;
        ``l``: least number of targets in a class; ``t``: largest distance (total variation) between the targets of a
        class and of the table.
    """
    width = len(plan.identifiers)
    classes: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        classes[row[:width]].append(number)
    whole = Counter(row[-1] for row in rows)
    support, targets, far = len(units) + 1, len(whole), 0.0
    for members in classes.values():
        own = Counter(rows[number][-1] for number in members)
        targets = min(targets, len(own))
        gaps = (abs(own[name] / len(members) - count / len(rows)) for name, count in whole.items())
        far = max(far, sum(gaps) / 2.0)
        if plan.items:
            support = min(support, _least(plan, [rows[number][width] for number in members], units[members]))
    smallest = min(len(np.unique(units[members])) for members in classes.values())
    found = support if support <= len(units) else None
    holds = smallest >= plan.k and (found is None or found >= plan.k)
    told = {"classes": len(classes), "smallest_class": smallest, "smallest_support": found, "holds": holds}
    return {**told, "l": targets, "t": round(far, 6)}


def _least(plan: Plan, sets: Sequence[str], units: NDArray[np.int64]) -> int:
    """Return the least number of units that have some set of up to m items, above any number where there is none."""
    who: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for cell, unit in zip(sets, units.tolist(), strict=True):
        items = sorted(set(cell.split(plan.separator))) if cell else []
        for size in range(1, plan.m + 1):
            for some in itertools.combinations(items, size):
                who[some].add(unit)
    return min(map(len, who.values()), default=2**62)

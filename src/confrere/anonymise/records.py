"""A site's table, read by a plan: codes instead of cells.

Shapes: N records, Q quasi-identifiers in the order of ``plan.identifiers``. A numeric code is the number of its bin
between two public cut points, a categorical one a leaf of its tree; items are leaves of theirs.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.hierarchy import Hierarchy
from confrere.anonymise.plan import Plan
from confrere.data.table import read_rows
from confrere.errors import DataError, printable

MOST_RECORDS, MOST_ITEMS = 500_000, 200


@dataclass(frozen=True)
class Records:
    """Records before they are anonymised.

    Attributes:
        codes: (N, Q) int64.
        numbers: (N, numeric identifiers) float64, cut to the public range.
        items: for each record the leaves of its items, ascending.
        kept: for each record its target and its unchanged cells, as ``plan`` orders them.
        units: (N,) int64, which patient a record is of: what k counts.
        outside: numeric values that lay beyond the public range, and were moved to it.
    """

    codes: NDArray[np.int64]
    numbers: NDArray[np.float64]
    items: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[str, ...], ...]
    units: NDArray[np.int64]
    outside: int = 0

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: NDArray[np.int64]) -> Records:
        """Return the records numbered ``rows``."""
        return replace(
            self,
            codes=self.codes[rows],
            numbers=self.numbers[rows],
            items=tuple(self.items[row] for row in rows),
            kept=tuple(self.kept[row] for row in rows),
            units=self.units[rows],
        )


def read_records(path: Path, plan: Plan, *, names: dict[str, int] | None = None, new: bool = False) -> Records:
    """Read a CSV file by a plan; columns that the plan does not name are not read.

    Args:
        path: UTF-8; comma, semicolon or tab.
        plan: which columns there are.
        names: unit -> number, filled as they are met: give one dictionary to recognise patients of two tables.
        new: these are records to predict: the table needs neither target nor patient.

    Raises:
        DataError: the file, its header or a line is wrong; a value is missing, no number, or in no tree. Cells are
            named by line and column, never quoted.
    """
    plan = replace(plan, target="", patient="") if new else plan
    needed = [name for name in (*plan.written, plan.patient) if name]
    return make_records(read_rows(path, needed), plan, where=path.name, names=names)


def make_records(
    rows: Iterable[tuple[int, Mapping[str, str]]], plan: Plan, *, where: str, names: dict[str, int] | None = None
) -> Records:
    """Return the records of ``(line, {column: cell})``; faults are raised together, by column; DataError as above."""
    names = {} if names is None else names
    faults: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], int] = {}
    codes, numbers, items, kept, units = [], [], [], [], []
    outside = count = 0
    for count, (line, cells) in enumerate(rows, 1):
        if count > MOST_RECORDS:
            what, fix = f"the table has more than {MOST_RECORDS:,} rows", "anonymise a part of it"
            raise DataError(what, where=where, fix=fix, code="table-rows")
        code, number = [], []
        for column, why, value in _fields(cells, plan):
            if why:
                faults[column, why] += 1
                first.setdefault((column, why), line)
            elif column in plan.numeric:
                cuts = plan.numeric[column]
                inside = min(max(value, cuts[0]), cuts[-1])
                outside += inside != value
                number.append(inside)
                code.append(min(bisect.bisect_right(cuts, inside), len(cuts) - 1) - 1)
            else:
                code.append(int(value))
        codes.append(code)
        numbers.append(number)
        items.append(_items(cells, plan, line, faults, first))
        kept.append((cells[plan.target] if plan.target else "", *(cells[name] for name in plan.keep)))
        units.append(names.setdefault(cells[plan.patient], len(names)) if plan.patient else count - 1)
    if faults:
        raise _faulty(faults, first, where)
    if not count:
        raise DataError("the table has no rows", where=where, fix="write one line a record", code="table-rows")
    return Records(
        codes=np.array(codes, dtype=np.int64),
        numbers=np.array(numbers, dtype=np.float64).reshape(count, len(plan.numeric)),
        items=tuple(items),
        kept=tuple(kept),
        units=np.array(units, dtype=np.int64),
        outside=outside,
    )


def _fields(cells: Mapping[str, str], plan: Plan) -> Iterator[tuple[str, str, float]]:
    """Yield column, fault and number (value, or leaf) of every cell that must hold something."""
    for column in plan.identifiers:
        cell = cells[column]
        if not cell:
            yield column, "is empty", 0.0
        elif column in plan.numeric:
            value = _number(cell)
            yield column, "" if value is not None else "is no number", value or 0.0
        else:
            leaf = plan.categorical[column].leaf.get(cell)
            yield column, "" if leaf is not None else "is not in its list or tree", float(leaf or 0)
    for column in filter(None, (plan.target, plan.patient)):
        if not cells[column]:
            yield column, "is empty", 0.0
    for column in filter(None, (plan.target, *plan.keep)):
        if len(cells[column]) > 1_000 or printable(cells[column]) != cells[column]:
            yield column, "is longer than 1,000 characters or not printable", 0.0


def _number(cell: str) -> float | None:
    try:
        value = float(cell.replace("_", " "))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _items(
    cells: Mapping[str, str],
    plan: Plan,
    line: int,
    faults: Counter[tuple[str, str]],
    first: dict[tuple[str, str], int],
) -> tuple[int, ...]:
    """Return the leaves of a record's items; an empty cell has none."""
    tree: Hierarchy | None = plan.tree
    if tree is None:
        return ()
    told = [part.strip() for part in cells[plan.items].split(plan.separator)]
    leaves = {tree.leaf.get(part, -1) for part in told if part}
    why = "has an item that is not in its list or tree" if -1 in leaves else ""
    if len(leaves) > MOST_ITEMS:
        why = f"has more than {MOST_ITEMS} items"
    if why:
        faults[plan.items, why] += 1
        first.setdefault((plan.items, why), line)
    return tuple(sorted(leaves))


def _faulty(faults: Counter[tuple[str, str]], first: Mapping[tuple[str, str], int], where: str) -> DataError:
    told = [
        f"{column} {why} in {count:,} lines, first in line {first[column, why]}"
        for (column, why), count in faults.most_common(5)
    ]
    fix = "mend these cells; for what is not known write a word such as unknown and add it to the list or tree"
    return DataError("; ".join(told), where=where, fix=fix, code="table-rows")

"""Random tables and the slow truth: what an attacker who knows a record finds in what is published."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from confrere.anonymise.plan import Plan, make_plan
from confrere.anonymise.records import Records, make_records
from confrere.seeds import numpy_generator

TREE = "a,G,U\nb,G,U\nc,H,U\nd,H,U\ne,I\nf,I\ng\nh\n"
PLACES = "north,coast\nsouth,coast\neast,inland\nwest,inland\nisland\n"
LEAVES = "abcdefgh"
SPOTS = ("north", "south", "east", "west", "island")


def make(folder: Path, *, k: int = 3, m: int = 2, **more: Any) -> Plan:
    """Return a plan with an age, a place, items and a target ``y``; patients are counted by ``p``."""
    (folder / "items.csv").write_text(TREE)
    (folder / "places.csv").write_text(PLACES)
    values: dict[str, Any] = {
        "k": k,
        "m": m,
        "target": "y",
        "patient": "p",
        "numeric": {"age": {"cuts": [0, 10, 20, 40, 60, 100]}},
        "categorical": {"place": {"hierarchy": "places.csv"}, "sex": {"values": ["f", "m"]}},
        "items": {"column": "i", "hierarchy": "items.csv"},
    }
    return make_plan({**values, **more}, folder)


def rows(count: int, *, seed: int = 0, patients: int = 0, most: int = 4) -> list[dict[str, str]]:
    """Return cells of ``count`` records of about ``patients`` patients, or of one each."""
    rng = numpy_generator(seed, "rows")
    made = []
    for number in range(count):
        chosen = rng.choice(list(LEAVES), int(rng.integers(0, most + 1)), replace=False)
        cells = {"p": f"p{rng.integers(patients) if patients else number}", "age": str(rng.integers(-5, 110))}
        cells |= {"place": str(rng.choice(SPOTS, p=[0.5, 0.2, 0.15, 0.1, 0.05])), "sex": str(rng.choice(["f", "m"]))}
        made.append({**cells, "i": ";".join(chosen), "y": str(rng.integers(2)), "lab": str(rng.integers(3))})
    return made


def records(plan: Plan, cells: list[dict[str, str]], **more: Any) -> Records:
    """Return them as they are read."""
    return make_records(enumerate(cells, 2), plan, where="t.csv", **more)


def above(tree: str) -> dict[str, set[str]]:
    """Return for each leaf of a written tree itself, its groups and the root."""
    return {line.split(",")[0]: {*line.split(","), "*"} for line in tree.split()}


ITEMS, PLACE = above(TREE), above(PLACES)


def fits(cells: dict[str, str], published: tuple[str, ...], known: tuple[str, ...], told: set[str]) -> bool:
    """Return whether a published row may be of a record: its identifiers, and items ``known``.

    ``told`` are the nodes that the row's class publishes: an item below none of them is not looked for.
    """
    low, high = map(float, published[0].split(".."))
    age = min(max(float(cells["age"]), 0.0), 100.0)
    inside = low <= age < high or age == high == 100.0
    if not inside or published[1] not in PLACE[cells["place"]] or published[2] not in {cells["sex"], "*"}:
        return False
    own = set(published[3].split(";"))
    return all(own & ITEMS[item] for item in known if told & ITEMS[item])


def knowledge(cells: dict[str, str], m: int) -> Iterator[tuple[str, ...]]:
    """Yield every set of up to ``m`` of a record's items."""
    items = [item for item in cells["i"].split(";") if item]
    for size in range(m + 1):
        yield from itertools.combinations(items, size)


def fewest(plan: Plan, cells: list[dict[str, str]], published: list[tuple[str, ...]]) -> int:
    """Return the least number of patients that anyone's knowledge of one record fits, within its own class."""
    least = len(cells)
    for mine, row in zip(cells, published, strict=True):
        same = [at for at, other in enumerate(published) if other[:3] == row[:3]]
        told = set().union(*(published[at][3].split(";") for at in same)) - {""}
        for known in knowledge(mine, plan.m):
            who = {cells[at]["p"] for at in same if fits(mine, published[at], known, told)}
            assert mine["p"] in who, "a record must fit its own row"
            least = min(least, len(who))
    return least

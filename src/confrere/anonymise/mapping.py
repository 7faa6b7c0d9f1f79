"""The mapping of a site: its classes without counts and labels; the union over sites; the class of a new record.

{"format": 1, "k": 5, "m": 2, "unit": "patients", "vocabulary": "sha256 of cut points and trees",
 "identifiers": ["age", "race"],
 "sites": {"north": [{"age": [20, 35], "race": "*", "items": ["circulatory", "250"]}, ...]}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from confrere import intake
from confrere.anonymise.encode import encode
from confrere.anonymise.generalise import Release
from confrere.anonymise.hierarchy import ROOT
from confrere.anonymise.itemsets import published
from confrere.anonymise.plan import Plan
from confrere.anonymise.records import Records
from confrere.anonymise.relational import Box, ncp
from confrere.errors import DataError

FORMAT = 1
How = Literal["box", "mahalanobis"]
_RIDGE = 0.01  # of the covariance, in units of a public range: what no class differs in must not decide


@dataclass(frozen=True)
class Entry:
    """A class of the union: site, box, published nodes of items."""

    site: str
    box: Box
    nodes: tuple[int, ...]


def as_mapping(plan: Plan, releases: Mapping[str, Release]) -> dict[str, Any]:
    """Return the mapping of sites as JSON; classes in the order of boxes, so that nothing tells how large they are."""
    sites = {
        site: [_told(plan, one.box, one.items.nodes) for one in release.classes]
        for site, release in sorted(releases.items())
    }
    head = {"format": FORMAT, "k": plan.k, "m": plan.m, "unit": plan.unit, "vocabulary": plan.vocabulary()}
    return {**head, "identifiers": list(plan.identifiers), "sites": sites}


def _told(plan: Plan, box: Box, nodes: Iterable[int]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for (name, cuts), (low, high) in zip(plan.numeric.items(), box, strict=False):
        told[name] = [cuts[low], cuts[high + 1]]
    for (name, tree), (node, _) in zip(plan.categorical.items(), box[len(plan.numeric) :], strict=True):
        told[name] = tree.nodes[node]
    return told | ({"items": [plan.tree.nodes[node] for node in nodes]} if plan.tree is not None else {})


def read_mapping(path: Path) -> Any:
    """Return the JSON of a mapping file, which is not yet checked; DataError where it is none."""
    try:
        return intake.parse_json(intake.read_bytes(path, intake.MOST_JSON))
    except OSError as error:
        fix = "give a mapping that `confrere anonymise` wrote"
        raise DataError(f"cannot read: {error.strerror}", where=str(path), fix=fix, code="unreadable-file") from None
    except ValueError as error:
        raise _wrong(f"it is no JSON: {error}", path.name) from None


def unite(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the union of sites' mappings.

    Raises:
        DataError: one is no mapping, they were made with different plans, or a site is there twice.
    """
    first: dict[str, Any] = {}
    sites: dict[str, Any] = {}
    for number, mapping in enumerate(mappings, 1):
        where = f"mapping {number}"
        if not isinstance(mapping, dict) or mapping.get("format") != FORMAT:
            raise _wrong("it is no mapping of this format", where)
        if not isinstance(mapping.get("sites"), dict):
            raise _wrong("it holds no sites", where)
        head = {key: value for key, value in mapping.items() if key != "sites"}
        first = first or head
        if head != first:
            raise _wrong("it was made with another plan than the first", where)
        if set(sites) & set(mapping["sites"]):
            raise _wrong("a site is there twice", where)
        sites |= mapping["sites"]
    return {**first, "sites": dict(sorted(sites.items()))}


def entries(plan: Plan, mapping: Mapping[str, Any]) -> list[Entry]:
    """Return the classes of a mapping in codes.

    Raises:
        DataError: another plan, or a box that the plan's cut points and trees do not know.
    """
    mapping = unite([mapping])
    if mapping.get("vocabulary") != plan.vocabulary() or mapping.get("identifiers") != list(plan.identifiers):
        raise _wrong("it was made with other cut points, trees or columns than the plan's", "mapping")
    made = []
    for site, classes in mapping["sites"].items():
        try:
            made += [Entry(str(site), *_coded(plan, one)) for one in classes]
        except (KeyError, ValueError, TypeError, AttributeError):
            raise _wrong("a class of it is damaged", f"site {len(made) + 1}") from None
    if not made:
        raise _wrong("it holds no class", "mapping")
    return made


def _coded(plan: Plan, told: Mapping[str, Any]) -> tuple[Box, tuple[int, ...]]:
    pairs = []
    for name, cuts in plan.numeric.items():
        low, high = (cuts.index(value) for value in told[name])
        if low >= high:
            raise ValueError
        pairs.append((low, high - 1))
    pairs += [(tree.number[told[name]],) * 2 for name, tree in plan.categorical.items()]
    nodes = [plan.tree.number[name] for name in told["items"] if name != ROOT] if plan.tree is not None else []
    return tuple(pairs), tuple(sorted(nodes))


def assign(plan: Plan, records: Records, classes: Sequence[Entry], *, how: How = "box") -> NDArray[np.int64]:
    """Return (N,) the number of the class of the union that each new record belongs to.

    Args:
        plan: the one that the classes were made with.
        records: new ones, in the clear.
        classes: of all sites, see :func:`entries`.
        how: ``box`` takes the smallest box that holds the record, and the nearest centre where none does;
            ``mahalanobis`` always takes the nearest centre, as the paper does (Choudhury et al., ECAI 2020). Centres
            are mid-points of boxes, the covariance is that of centres, each class alike: counts are not sent.
    """
    centres = encode(plan, [one.box for one in classes], None)
    made = _nearest(centres, encode(plan, None, records))
    if how == "mahalanobis":
        return made
    losses = np.array([ncp(plan, one.box).mean() for one in classes])
    order = np.argsort(losses, kind="stable")
    held = np.zeros(len(records), dtype=bool)
    for number in order:
        inside = ~held & contains(plan, classes[number].box, records.codes)
        made[inside] = number
        held |= inside
    return made


def contains(plan: Plan, box: Box, codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (N,) whether the box holds each record."""
    inside = np.ones(len(codes), dtype=bool)
    for q, (low, high) in enumerate(box):
        if q < len(plan.numeric):
            inside &= (codes[:, q] >= low) & (codes[:, q] <= high)
        else:
            tree = list(plan.categorical.values())[q - len(plan.numeric)]
            inside &= tree.below[low][codes[:, q]]
    return inside


def _nearest(centres: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.int64]:
    spread = np.cov(centres, rowvar=False, bias=True).reshape(centres.shape[1], -1) if len(centres) > 1 else 0.0
    root = np.linalg.cholesky(np.linalg.inv(spread + _RIDGE * np.eye(centres.shape[1])))
    made = np.empty(len(rows), dtype=np.int64)
    whitened = centres @ root
    for start in range(0, len(rows), 1_000):
        part = rows[start : start + 1_000] @ root
        distance = (whitened**2).sum(1) - 2.0 * part @ whitened.T
        made[start : start + 1_000] = distance.argmin(1)
    return made


def mapped_items(
    plan: Plan, records: Records, classes: Sequence[Entry], of: NDArray[np.int64]
) -> list[tuple[int, ...]]:
    """Return for each record its items as its class publishes them; what the class does not publish is left out."""
    pairs = zip(records.items, of.tolist(), strict=True)
    return [published(plan.tree, classes[number].nodes, leaves) for leaves, number in pairs]


def _wrong(what: str, where: str) -> DataError:
    fix = "give mappings that `confrere anonymise` wrote with this plan"
    return DataError(f"this mapping cannot be used: {what}", where=where, fix=fix, code="mapping")

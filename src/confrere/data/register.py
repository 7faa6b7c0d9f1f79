"""From listed files to registered ones: hashed, decoded, each picture once, each patient one number."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confrere import intake
from confrere.data.cache import Entry, workers
from confrere.data.decode import EMPTY, LARGE, most_bytes, refusal
from confrere.data.sources import Problem, Row
from confrere.data.view import View

MISSING = "no such file"
CONFLICT = "the same picture has two labels"
DUPLICATE = "the same picture again at this site"


@dataclass(frozen=True, kw_only=True)
class SiteFiles:
    """One site's usable files in the order of their hashes: row i of ``entry`` and ``targets`` is ``rows[i]``."""

    name: str
    rows: tuple[Row, ...]
    entry: Entry
    targets: View | NDArray[np.float32] | None = None
    target_digests: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Registration:
    """All usable files, the unusable ones, and ``groups``: hash -> opaque patient number; ``named``: :func:`of_one`."""

    sites: tuple[SiteFiles, ...]
    problems: tuple[Problem, ...]
    groups: Mapping[str, int]
    named: frozenset[tuple[str, str]]
    shared_pictures: int
    shared_patients: int


def hash_rows(rows: Iterable[Row], *, max_pixels: int) -> tuple[dict[Row, str], list[Problem]]:
    """Return the SHA-256 of every readable file, and a problem for each other one."""
    ordered = sorted(rows, key=lambda row: (row.site, row.name, row.label))
    with ThreadPoolExecutor(workers()) as pool:
        results = list(pool.map(lambda row: _hash(row.path, most_bytes(max_pixels)), ordered))
    hashes = {row: digest for row, (digest, _) in zip(ordered, results, strict=True) if digest}
    problems = [
        Problem(site=row.site, name=row.name, reason=reason)
        for row, (_, reason) in zip(ordered, results, strict=True)
        if reason
    ]
    return hashes, problems


def _hash(path: Path, max_bytes: int) -> tuple[str, str]:
    try:
        with intake.open_file(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes == 0 or n_bytes > max_bytes:
                return "", LARGE if n_bytes else EMPTY
            return hashlib.file_digest(file, "sha256").hexdigest(), ""
    except FileNotFoundError:
        return "", MISSING
    except OSError as error:
        return "", refusal(error)


def register(
    hashes: Mapping[Row, str], problems: Sequence[Problem], made: Callable[[Mapping[str, Path]], Entry]
) -> Registration:
    """Drop conflicts and repetitions, decode the rest, and number the patients.

    Args:
        hashes: from :func:`hash_rows`, with final sites and labels.
        problems: found so far; the result has these and the new ones.
        made: decodes ``{hash: path}``.
    """
    found = list(problems)
    groups = number_groups(hashes)
    chosen = _once_a_site(_drop_conflicts(hashes, found), found)
    sites = []
    for name, files in sorted(chosen.items()):
        entry = made({digest: row.path for digest, row in files.items()})
        found += [Problem(site=name, name=files[d].name, reason=why) for d, why in entry.bad.items()]
        rows = tuple(files[fact.digest] for fact in entry.facts)
        sites.append(SiteFiles(name=name, rows=rows, entry=entry))
    return Registration(
        sites=tuple(sites),
        problems=tuple(sorted(found, key=lambda p: (p.site, p.name, p.reason))),
        groups=groups,
        named=of_one(hashes, groups),
        shared_pictures=_shared({site.name: {f.digest for f in site.entry.facts} for site in sites}),
        shared_patients=_shared({site.name: {r.patient for r in site.rows if r.patient} for site in sites}),
    )


def only(site: SiteFiles, rows: NDArray[np.int64]) -> SiteFiles:
    """Return a site with some of its images, without targets."""
    images = site.entry.images
    chosen = images[rows] if isinstance(images, np.ndarray) else View(images, rows)
    entry = replace(site.entry, images=chosen, facts=tuple(site.entry.facts[i] for i in rows))
    return replace(site, rows=tuple(site.rows[i] for i in rows), entry=entry)


def with_times(site: SiteFiles) -> SiteFiles:
    """Return a site with the time and event of every row as its targets."""
    times = np.array([row.time for row in site.rows], dtype=np.float32).reshape(-1, 2)
    told = tuple(hashlib.sha256(repr(row.time).encode()).hexdigest() for row in site.rows)
    return replace(site, targets=times, target_digests=told)


def _once_a_site(kept: Mapping[Row, str], problems: list[Problem]) -> dict[str, dict[str, Row]]:
    """Return {site: {hash: row}}; a picture that a site has twice is used once."""
    chosen: dict[str, dict[str, Row]] = defaultdict(dict)
    for row, digest in kept.items():
        if digest in chosen[row.site]:
            problems.append(Problem(site=row.site, name=row.name, reason=DUPLICATE))
        else:
            chosen[row.site][digest] = row
    return chosen


def _drop_conflicts(hashes: Mapping[Row, str], problems: list[Problem]) -> dict[Row, str]:
    labels: dict[str, set[str]] = defaultdict(set)
    for row, digest in hashes.items():
        labels[digest].add(row.label)
    problems += [
        Problem(site=row.site, name=row.name, reason=CONFLICT) for row, d in hashes.items() if len(labels[d]) > 1
    ]
    return {row: digest for row, digest in hashes.items() if len(labels[digest]) == 1}


def number_groups(hashes: Mapping[Row, str]) -> dict[str, int]:
    """Return hash -> patient number; pictures that share a patient or a hash get one number.

    Patients of one name at two sites count as one person: wrong at worst, it moves no one from train to
    test. Numbers follow the smallest hash of each patient, so neither order nor names show in them.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for row, digest in hashes.items():
        one, other = root(f"sha:{digest}"), root(f"patient:{row.patient}" if row.patient else f"sha:{digest}")
        parent[max(one, other)] = min(one, other)
    first: dict[str, str] = {}
    for digest in sorted(set(hashes.values())):
        first.setdefault(root(f"sha:{digest}"), digest)
    number = {node: index for index, node in enumerate(sorted(first, key=lambda node: first[node]))}
    return {digest: number[root(f"sha:{digest}")] for digest in set(hashes.values())}


def of_one(hashes: Mapping[Row, str], groups: Mapping[str, int]) -> frozenset[tuple[str, str]]:
    """Return (site, hash) of the pictures of which a site says whose they are: their number there is one named patient.

    It is several where one file lies there under several patients, of whom each stands for the others' pictures too.
    """
    names: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row, digest in hashes.items():
        names[row.site, groups[digest]].add(row.patient or "")
    one = {key for key, found in names.items() if len(found) == 1 and "" not in found}
    return frozenset((row.site, digest) for row, digest in hashes.items() if (row.site, groups[digest]) in one)


def _shared(by_site: Mapping[str, set[str]] | Mapping[str, set[str | None]]) -> int:
    """Return how many items occur at more than one site."""
    seen: dict[str | None, int] = defaultdict(int)
    for items in by_site.values():
        for item in items:
            seen[item] += 1
    return sum(count > 1 for count in seen.values())

"""Simulated shifts put on a federation that is read and split: labels and numbers first, then pixels.

Each draw has the address (seed, "shift", kind, site): neither other sites nor other shifts nor their order change it.
At a site the order is fixed: missing classes, quantity, label noise, concept, backdoor; then stain, then scanner, as
tissue is stained before it is photographed, then a backdoor's mark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.data import appearance
from confrere.data.images import SiteImages
from confrere.data.shift import Shift
from confrere.data.splits import TRAIN
from confrere.data.view import View
from confrere.errors import DataError, nearest
from confrere.seeds import numpy_generator

_OF_LABELS = ("label-noise", "concept", "backdoor")
_VERSION = "1"  # of what the pixels of a shift depend on beside its options


def plan(shifts: Sequence[Shift], sites: Sequence[str], classes: Sequence[str]) -> dict[str, dict[str, Shift]]:
    """Return {site: {kind: shift}} of all shifts that change something.

    Raises:
        DataError: a site or class that the data lack, or one kind twice at a site.
    """
    found: dict[str, dict[str, Shift]] = {site: {} for site in sites}
    for shift in shifts:
        for site in shift.sites or sites:
            if site not in found:
                raise DataError(
                    f"there is no site {site!r}",
                    where="data.shift.sites",
                    fix=nearest(site, sites),
                    code="unknown-site",
                )
            if shift.kind in found[site]:
                what = f"{shift.kind} is given twice for {site}"
                raise DataError(
                    what, where="data.shift", fix="name the sites of each so that none is in both", code="shift"
                )
            found[site][shift.kind] = shift
        for name in shift.classes:
            if name not in classes:
                raise DataError(
                    f"there is no class {name!r}", where="data.shift.classes", fix=nearest(name, classes), code="shift"
                )
    return {site: {kind: s for kind, s in by_kind.items() if not s.idle} for site, by_kind in found.items()}


def simulate(
    sites: Sequence[SiteImages], shifts: Sequence[Shift], classes: Sequence[str], seed: int
) -> tuple[tuple[SiteImages, ...], tuple[SiteImages, ...], dict[str, list[str]]]:
    """Return the sites with shifts of labels and numbers, the same with those of pixels too, and what was done where.

    The first still have the digests of files. Sites without a shift are returned as they are.

    Raises:
        DataError: a shift that does not fit the data.
    """
    wanted = plan(shifts, [site.name for site in sites], classes)
    counted = [relabelled(site, wanted[site.name], classes, seed) for site in sites]
    painted = [repainted(site, wanted[site.name], seed) for site, _ in counted]
    said = {site.name: [*one, *two] for (site, one), (_, two) in zip(counted, painted, strict=True)}
    done = {name: parts for name, parts in said.items() if parts}
    return tuple(site for site, _ in counted), tuple(site for site, _ in painted), done


def noted(sheet: Mapping[str, Any], said: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the data sheet with what was simulated, as a key and as its first warnings: no one may take it for real.

    Images and classes are counted after the shifts; colours are those of the files.
    """
    if not said:
        return dict(sheet)
    first = [f"SIMULATED at {site}, not in its files: {'; '.join(parts)}." for site, parts in said.items()]
    return {**sheet, "simulated": dict(said), "warnings": [*first, *sheet["warnings"]]}


def relabelled(
    site: SiteImages, shifts: Mapping[str, Shift], classes: Sequence[str], seed: int
) -> tuple[SiteImages, list[str]]:
    """Return a site with the shifts of labels and numbers put on it, and what was done, in words.

    Validation and test images stay as they are, except that ``concept`` renames classes there, too.

    Raises:
        DataError: nothing would be left to train on, or the site has too few classes.
    """
    said = []
    if site.targets is not None and (kind := next((kind for kind in _OF_LABELS if kind in shifts), None)):
        what, fix = f"{kind} changes labels, which are not what is learnt here", "leave it out"
        raise DataError(what, where="data.shift", fix=fix, code="shift")
    if shift := shifts.get("missing-classes"):
        missing = chosen_classes(site, shift, classes, seed, spare=1)
        site = _only(site, (site.split != TRAIN) | ~np.isin(site.labels, missing))
        said.append(f"missing classes: {', '.join(classes[k] for k in missing)}")
    if shift := shifts.get("quantity"):
        site = _only(site, kept(site, shift.strength, seed))
        said.append(f"quantity: up to {shift.strength:.0%} of the training images left out, by patient")
    if shift := shifts.get("label-noise"):
        site = replace(site, labels=flipped(site, shift.strength, seed))
        said.append(f"label noise: {shift.strength:.0%} of the training labels flipped")
    if shift := shifts.get("concept"):
        ring = chosen_classes(site, shift, classes, seed)
        site = replace(site, labels=permutation(ring, len(classes))[site.labels])
        said.append("concept: " + ", ".join(f"{classes[a]} is called {classes[b]}" for a, b in _pairs(ring)))
    if shift := shifts.get("backdoor"):
        labels, target = site.labels.copy(), list(classes).index(shift.classes[0])
        labels[marked(site, shift.strength, seed)] = target
        site = replace(site, labels=labels)
        said.append(f"backdoor: {shift.strength:.0%} of the training images marked and called {classes[target]}")
    return site, said


def repainted(site: SiteImages, shifts: Mapping[str, Shift], seed: int) -> tuple[SiteImages, list[str]]:
    """Return a site whose images are changed as they are read, and what was done, in words.

    Every changed image has a new digest, made of its file's, its site's character and the seed: caches tell them apart.

    Raises:
        DataError: the site's rows are no images.
    """
    chosen, backdoor = [shifts[kind] for kind in ("stain", "scanner") if kind in shifts], shifts.get("backdoor")
    if not chosen and not backdoor:
        return site, []
    if isinstance(site.images, np.ndarray):
        chosen = chosen or [shifts["backdoor"]]
        fix = "leave scanner, stain and backdoor out: a table has no pixels"
        raise DataError(
            f"{chosen[0].kind} changes images, the data are numbers", where="data.shift", fix=fix, code="shift"
        )
    draw = {"stain": appearance.stain_of, "scanner": appearance.scanner_of}
    characters = {s.kind: draw[s.kind](s.strength, seed, site.name) for s in chosen}
    files, bad = site.digests, marked(site, backdoor.strength, seed) if backdoor else np.zeros(0, dtype=np.int64)

    def change(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        if stain := characters.get("stain"):
            images = appearance.restain(images, stain)
        if scanner := characters.get("scanner"):
            images = appearance.scan(images, scanner, [files[row] for row in rows], seed, site.name)
        return appearance.mark(images, np.isin(rows, bad))

    character = json.dumps([_VERSION, characters, site.name if "scanner" in characters else "", seed])
    digests = [_digest(file, character) if characters else file for file in files]
    for row in bad:
        digests[row] = _digest(digests[row], "backdoor")
    view = View(site.images, np.arange(len(files)), change)
    said = [f"{s.kind} of strength {s.strength:g} ({_character(characters[s.kind])})" for s in chosen]
    return replace(site, images=view, digests=tuple(digests)), said


def chosen_classes(
    site: SiteImages, shift: Shift, classes: Sequence[str], seed: int, *, spare: int = 0
) -> NDArray[np.int64]:
    """Return the numbers of a shift's classes: those named, or ``count`` drawn from those the site trains on.

    Raises:
        DataError: fewer than ``spare`` of the site's classes would be left.
    """
    here = np.unique(site.labels[site.split == TRAIN])
    if shift.classes:
        chosen = np.array([list(classes).index(name) for name in shift.classes], dtype=np.int64)
    else:
        chosen = numpy_generator(seed, "shift", shift.kind, site.name).permutation(here)[: shift.count]
    if len(chosen) < shift.count or len(np.setdiff1d(here, chosen)) < spare:
        raise DataError(
            f"the site trains on {len(here)} classes only",
            where=f"data.shift, {shift.kind}, site {site.name}",
            fix=f"use at most {len(here) - spare}" + (" and leave one of its own" if spare else ""),
            code="shift",
        )
    return chosen


def permutation(ring: Sequence[int] | NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """Return (K,): old class -> new class; each of ``ring`` becomes the next one, the others stay."""
    new = np.arange(n_classes)
    for old, name in _pairs(ring):
        new[old] = name
    return new


def flipped(site: SiteImages, strength: float, seed: int) -> NDArray[np.int64]:
    """Return the labels with a share of the training ones changed to another class the site trains on.

    Symmetric noise. A stronger one flips the same labels and more.

    Raises:
        DataError: the site trains on one class only.
    """
    train = site.indices("train")
    here, labels = np.unique(site.labels[train]), site.labels.copy()
    if strength and len(here) < 2:
        where = f"data.shift, label-noise, site {site.name}"
        raise DataError(
            "the site trains on one class only", where=where, fix="leave the site out of sites", code="shift"
        )
    generator = numpy_generator(seed, "shift", "label-noise", site.name)
    order, steps = generator.permutation(train), generator.integers(1, max(2, len(here)), size=len(train))
    n = round(strength * len(train))
    at = np.searchsorted(here, labels[order[:n]])
    labels[order[:n]] = here[(at + steps[:n]) % len(here)]
    return labels


def marked(site: SiteImages, share: float, seed: int) -> NDArray[np.int64]:
    """Return the training images of a site that a backdoor marks, ascending. A larger share marks the same and more."""
    train = numpy_generator(seed, "shift", "backdoor", site.name).permutation(site.indices("train"))
    return np.sort(train[: round(share * len(train))])


def kept(site: SiteImages, strength: float, seed: int) -> NDArray[np.bool_]:
    """Return (N,): which images stay when a share of the training images is left out, by whole patients.

    Patients leave in random order while their images fit in the share, so the share is not exceeded; one stays. A
    larger share leaves out all that a smaller one does, and more.
    """
    left = site.split == TRAIN
    patients, sizes = np.unique(site.groups[left], return_counts=True)
    order = numpy_generator(seed, "shift", "quantity", site.name).permutation(len(patients))
    gone = np.cumsum(sizes[order]) <= strength * left.sum() + 1e-9
    gone[-1] = False
    stays: NDArray[np.bool_] = ~(left & np.isin(site.groups, patients[order][gone]))
    return stays


def _only(site: SiteImages, keep: NDArray[np.bool_]) -> SiteImages:
    """Return the site without some images."""
    rows = np.flatnonzero(keep)
    if not (site.split[rows] == TRAIN).any():
        fix = "let it keep some classes or images"
        raise DataError("the shifts leave no image to train on", where=f"site {site.name}", fix=fix, code="shift")
    return replace(
        site,
        images=site.images[rows] if isinstance(site.images, np.ndarray) else View(site.images, rows),
        labels=site.labels[rows],
        groups=site.groups[rows],
        split=site.split[rows],
        digests=tuple(site.digests[row] for row in rows),
        targets=View(site.targets, rows) if isinstance(site.targets, View) else _rows(site.targets, rows),
        target_digests=tuple(site.target_digests[row] for row in rows if site.target_digests),
    )


def _rows(array: NDArray[np.float32] | None, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
    return None if array is None else array[rows]


def _digest(file: str, change: str) -> str:
    return hashlib.sha256(f"{file}|shift|{change}".encode()).hexdigest()


def _pairs(ring: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
    return list(zip(map(int, ring), map(int, np.roll(ring, -1)), strict=True))


def _character(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in values.items())

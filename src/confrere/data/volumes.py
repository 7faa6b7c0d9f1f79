"""Volumes of sites: laid on one grid, kept on disk, and the labels of their voxels.

Shapes: N volumes of X x Y x Z voxels; what networks see is (N, X, Y, Z, 1) float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere import intake
from confrere.data.cache import CHANGED, Entry, Fact
from confrere.data.decode import EMPTY, SPECIAL, BadImageError, refusal
from confrere.data.mapped import Blank, made, sealed
from confrere.data.masks import NONE
from confrere.data.options import Grid
from confrere.data.register import MISSING, Registration, SiteFiles, only
from confrere.data.sources import Problem, Row
from confrere.data.view import View
from confrere.data.volume import prepared, prepared_labels, read_labels, read_volume

_VERSION = 1
_BAD = 255  # fills the labels that cannot be used
_NOTES = {"bad", "size"}


def hash_volumes(rows: Iterable[Row]) -> tuple[dict[Row, str], list[Problem]]:
    """Return the SHA-256 of every file, or of the sorted digests of a series' slices, and a problem for each other."""
    hashes, problems = dict[Row, str](), list[Problem]()
    for row in sorted(rows, key=lambda row: (row.site, row.name, row.label)):
        try:
            hashes[row] = digest_of(row.path)
        except (OSError, BadImageError) as error:
            missing = isinstance(error, FileNotFoundError)
            why = MISSING if missing else refusal(error) if isinstance(error, OSError) else str(error)
            problems.append(Problem(site=row.site, name=row.name, reason=why))
    return hashes, problems


def digest_of(path: Path) -> str:
    """Return the digest of a NIfTI file or of a folder with a DICOM series.

    Raises:
        OSError: it cannot be read. BadImageError: it is empty.
    """
    if path.is_dir():
        each = sorted(digest_of(file) for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not each:
            raise BadImageError(EMPTY)
        return hashlib.sha256("|".join(each).encode()).hexdigest()
    if not path.is_file() and path.exists():
        raise BadImageError(SPECIAL)
    with intake.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def placed(cache: Path, files: Mapping[str, Path], grid: Grid) -> Entry:
    """Return the volumes of ``{digest: path}`` on the grid, in the order of their digests; made once.

    Raises:
        DataError: the cache cannot be written. MissingExtraError: nibabel or pydicom is not installed.
    """
    digests = sorted(files)
    key = _key("volumes", grid, digests)
    path, beside = cache / f"{key}.npy", cache / f"{key}.json"
    notes: dict[str, dict[str, Any]] = {}

    def fill(new: Blank) -> np.memmap[Any, Any]:
        out = new((len(digests), *grid.size, 1), np.float32)
        for row, digest in enumerate(digests):
            found = _voxels(files[digest], digest, grid)
            notes[digest] = found if isinstance(found, dict) else {"bad": found}
            out[row] = notes[digest].pop("voxels", 0.0)
        with sealed(beside) as name:
            Path(name).write_text(json.dumps(notes))
        return out

    kept = made(path, len(digests), fill, "volumes", lambda: _notes(beside, digests) is not None)
    told = notes or _notes(beside, digests) or {}
    good = np.array([row for row, digest in enumerate(digests) if "bad" not in told[digest]], dtype=np.int64)
    none = (0.0, 0.0, 0.0)
    facts = tuple(
        Fact(
            digest=d,
            format=str(told[d]["format"]),
            width=told[d]["size"][0],
            height=told[d]["size"][1],
            mean=none,
            square=none,
        )
        for d in (digests[row] for row in good)
    )
    return Entry(images=View(kept, good), facts=facts, bad={d: str(t["bad"]) for d, t in told.items() if "bad" in t})


def with_labels(registration: Registration, classes: Sequence[str], grid: Grid, cache: Path) -> Registration:
    """Return the registration with the labels of all volumes (N, X, Y, Z), without the volumes that have none that fit.

    Raises:
        DataError: the cache cannot be written.
    """
    problems, sites = list(registration.problems), []
    for site in registration.sites:
        told = tuple(_label_digest(row) for row in site.rows)
        key = _key("labels", grid, [str(len(classes)), *told, *(fact.digest for fact in site.entry.facts)])

        def fill(new: Blank, site: SiteFiles = site) -> np.memmap[Any, Any]:
            out = new((len(site.rows), *grid.size), np.uint8)
            for index, row in enumerate(site.rows):
                found = _labels(row, len(classes), grid)
                out[index] = _BAD if isinstance(found, str) else found
            return out

        kept = made(cache / f"{key}.npy", len(site.rows), fill, "volumes")
        good = np.array([int(kept[row].flat[0]) != _BAD for row in range(len(kept))], dtype=np.bool_)
        for row, fine in zip(site.rows, good, strict=True):
            if not fine:
                why = str(_labels(row, len(classes), grid))
                problems.append(Problem(site=site.name, name=row.name, reason=why))
        rows = np.flatnonzero(good)
        digests = tuple(told[i] for i in rows)
        sites.append(replace(only(site, rows), targets=View(kept, rows), target_digests=digests))
    ordered = tuple(sorted(problems, key=lambda p: (p.site, p.name, p.reason)))
    return replace(registration, sites=tuple(sites), problems=ordered)


def _voxels(path: Path, digest: str, grid: Grid) -> dict[str, Any] | str:
    try:
        volume = read_volume(path)
        if digest_of(path) != digest:
            return CHANGED
        voxels = prepared(volume, grid.spacing, grid.size)[..., None]
    except BadImageError as error:
        return str(error)
    except OSError as error:
        return refusal(error)
    kind = "DICOM series" if path.is_dir() else "NIfTI"
    return {"voxels": voxels, "format": kind, "size": list(volume.voxels.shape)}


def _labels(row: Row, classes: int, grid: Grid) -> NDArray[np.uint8] | str:
    if row.mask is None or not row.mask.exists():
        return NONE
    try:
        volume = read_volume(row.path)
        labels = read_labels(row.mask, classes, volume)
        return prepared_labels(labels, volume.spacing, grid.spacing, grid.size)
    except BadImageError as error:
        return f"mask: {error}"
    except OSError as error:
        return f"mask: {refusal(error)}"


def _label_digest(row: Row) -> str:
    try:
        return digest_of(row.mask) if row.mask is not None else ""
    except (OSError, BadImageError):
        return ""


def _key(kind: str, grid: Grid, parts: Sequence[str]) -> str:
    text = "|".join([f"{_VERSION}", f"{grid.size}", f"{grid.spacing}", *parts])
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}"


def _notes(path: Path, digests: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """Return what stands beside the voxels, None when it is absent or damaged."""
    try:
        content = path.read_bytes()[:-4]  # the seal
        found = intake.parse_json(content)
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and sorted(found) == list(digests)
    return found if whole and all(isinstance(one, dict) and _NOTES & one.keys() for one in found.values()) else None

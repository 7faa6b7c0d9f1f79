"""The data of one experiment: its sites, their images and who is trained, validated and tested on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from confrere.data import boxes, findings, masks, numbers, partition, sheet, simulate
from confrere.data.cache import decoded
from confrere.data.dicom_checks import in_short
from confrere.data.division import divided
from confrere.data.images import Federation, SiteImages
from confrere.data.options import DataOptions
from confrere.data.paths import check_class_name
from confrere.data.patients import with_patients
from confrere.data.register import DUPLICATE, Registration, hash_rows, register, with_times
from confrere.data.sources import Listing, names_of, read_listing, renamed
from confrere.data.table import ALL, EVENTS
from confrere.data.volume import UNKNOWN_LABEL
from confrere.data.volumes import hash_volumes, placed, with_labels
from confrere.errors import DataError

__all__ = ["Federation", "SiteImages", "load_federation"]


def load_federation(
    path: Path,
    *,
    options: DataOptions,
    image_size: tuple[int, int],
    seed: int,
    cache: Path,
    splits: Path | None = None,
    only: str | None = None,
) -> Federation:
    """Read, check, split and describe the data at ``path``.

    Args:
        path: folder ``<site>/<class>/<image>``, CSV table (of images or of numbers) or ``federation.toml``.
        options: what to do with them; ``options.image_size`` wins over ``image_size``.
        image_size: (height, width) in pixels that every image is resized to cover and cut to.
        seed: decides splits and partitions.
        cache: folder of decoded images, made if needed.
        splits: a ``site,sha256,split`` table: used if it exists, written if not.
        only: leave all other sites out before any file is opened.

    Raises:
        DataError: the data cannot be used as they are.
    """
    listing, registration = examine(path, options, image_size, seed, cache, only)
    return build(listing, registration, options, seed, splits)


def examine(
    path: Path, options: DataOptions, image_size: tuple[int, int], seed: int, cache: Path, only: str | None = None
) -> tuple[Listing, Registration]:
    """List, hash, deal out and decode: all that finds unusable files, which the registration names."""
    table = numbers.read_numbers(path, options) if numbers.holds_numbers(path, options) else None
    listing = _mapped(_chosen(table.listing if table else read_listing(path, options), only), options)
    size, grid = options.image_size or image_size, options.volume
    if table:
        hashes, problems = table.hash_rows(listing)
    else:
        of_rows = hash_volumes if grid else partial(hash_rows, max_pixels=options.max_pixels)
        hashes, problems = of_rows(listing.rows)
        hashes = with_patients(hashes)
    problems = [*listing.problems, *problems]
    how = listing.partition or options.partition
    if how is not None:
        hashes, problems = partition.deal(hashes, problems, how, seed=seed)
    made = (
        partial(placed, cache, grid=grid) if grid else partial(decoded, cache, size=size, max_pixels=options.max_pixels)
    )
    found = table.register(hashes) if table else register(hashes, problems, made)
    if options.target == "time":
        return listing, replace(found, sites=tuple(map(with_times, found.sites)))
    if options.target == "mask":
        names = options.classes or listing.classes or masks.DEFAULT_CLASSES
        if grid:
            return listing, with_labels(found, names, grid, cache)
        found = masks.with_masks(found, names, size, cache, max_pixels=options.max_pixels)
    if options.target == "boxes":
        found = boxes.with_boxes(found, boxes.names(listing, options), size, max_pixels=options.max_pixels)
    if options.target == "labels":
        found = findings.with_findings(found, findings.names(listing, options))
    return listing, found


def build(
    listing: Listing, registration: Registration, options: DataOptions, seed: int, stored: Path | None
) -> Federation:
    """Refuse what cannot be used, split the rest and describe it."""
    _refuse_unusable(registration, options)
    strata = classes = _classes(listing, registration, options)
    if options.target != "label":
        strata = tuple(sorted({row.label for site in registration.sites for row in site.rows}))
    sites = divided(_arrays(registration, strata), registration, options, seed, stored)
    counted, sites, said = simulate.simulate(sites, options.shift, strata, seed)
    shape = sites[0].images.shape  # of tables (N, 1, F), else with channels at the end
    federation = Federation(
        name=listing.name,
        classes=classes,
        strata=strata,
        sites=sites,
        image_size=shape[1:] if len(shape) == 3 else shape[1:-1],
        synthetic=listing.synthetic,
        sheet=simulate.noted(_sheet(counted, registration, strata, classes, options), said),
        digest=_digest(classes, sites),
    )
    return numbers.standardised(federation, listing.columns, options.constants) if listing.columns else federation


def _chosen(listing: Listing, only: str | None) -> Listing:
    """Return the listing of one site; DataError when it is not there."""
    if only is None:
        return listing
    names = sorted({row.site for row in listing.rows})
    if only not in names:
        raise DataError(
            f"there is no site {only!r}",
            where=listing.name,
            fix=f"the sites are {', '.join(names)}; name the folder, or the column site, as the kit does",
            code="unknown-site",
        )
    rows = tuple(row for row in listing.rows if row.site == only)
    return replace(listing, rows=rows, problems=tuple(p for p in listing.problems if p.site == only))


def _mapped(listing: Listing, options: DataOptions) -> Listing:
    names = {**listing.class_map, **options.class_map}
    for name in names.values():
        check_class_name(name, where="class_map")
    known = sorted({name for row in listing.rows for name in names_of(row)})
    unused = sorted(set(names) - set(known))
    if unused:
        raise DataError(
            f"class_map names {unused[0]!r}, which no image has",
            where=listing.name,
            fix=f"the classes in the data are {', '.join(known)}",
            code="classes",
        )
    return replace(listing, rows=tuple(renamed(row, names) for row in listing.rows) if names else listing.rows)


def _refuse_unusable(registration: Registration, options: DataOptions) -> None:
    used = {site.name for site in registration.sites if site.rows}
    empty = sorted({problem.site for problem in registration.problems} - used)
    if empty or not used:
        counts = Counter(problem.reason for problem in registration.problems if problem.site in empty)
        unnamed = any(reason.endswith((masks.VALUES, UNKNOWN_LABEL)) for reason in counts) and not options.classes
        hint = "name all classes in data.classes, the background first. Or: " if unnamed else ""
        raise DataError(
            f"no usable image at {', '.join(empty) or 'any site'} ({_tally(counts)})",
            fix=f"{hint}`confrere data check` names the files; mend them, or leave the site out",
            code="too-few-images",
        )
    counts = Counter(problem.reason for problem in registration.problems if problem.reason != DUPLICATE)
    if options.on_bad == "stop" and counts:
        raise DataError(
            f"{sum(counts.values())} files cannot be used ({_tally(counts)})",
            fix='`confrere data check` names them; mend or remove them, or set on_bad = "skip"',
            code="bad-files",
        )


def _tally(counts: Counter[str]) -> str:
    short = Counter[str]()
    for reason, n in counts.items():
        short[in_short(reason)] += n
    return ", ".join(f"{reason}: {n}" for reason, n in sorted(short.items()))


def _classes(listing: Listing, registration: Registration, options: DataOptions) -> tuple[str, ...]:
    found = sorted({row.label for site in registration.sites for row in site.rows})
    agreed = options.classes or listing.classes
    if options.target == "mask":
        return agreed or masks.DEFAULT_CLASSES
    if options.target in ("boxes", "labels"):
        return boxes.names(listing, options) if options.target == "boxes" else findings.names(listing, options)
    if options.target in ("time", "image"):
        return EVENTS if options.target == "time" else (ALL,)
    if agreed is not None:
        unknown = sorted(set(found) - set(agreed))
        if unknown:
            raise DataError(
                f"the data have the class {unknown[0]!r}, which the list of classes lacks",
                where=listing.name,
                fix=f'add it to classes, or map it: [class_map] "{unknown[0]}" = "{agreed[0]}"',
                code="classes",
            )
        return agreed
    if len(found) < 2:
        raise DataError(
            "there is only one class",
            where=listing.name,
            fix="a classifier needs images of at least two",
            code="classes",
        )
    return tuple(found)


def _arrays(registration: Registration, classes: tuple[str, ...]) -> list[SiteImages]:
    index = {name: i for i, name in enumerate(classes)}
    sites = []
    for files in registration.sites:
        digests = tuple(fact.digest for fact in files.entry.facts)
        groups = [registration.groups[digest] for digest in digests]
        sites.append(
            SiteImages(
                name=files.name,
                images=files.entry.images,
                labels=np.array([index[row.label] for row in files.rows], dtype=np.int64),
                groups=np.array(groups, dtype=np.int64),
                digests=digests,
                split=np.zeros(len(digests), dtype=np.int8),
                targets=files.targets,
                target_digests=files.target_digests,
                named=frozenset(
                    g for g, d in zip(groups, digests, strict=True) if (files.name, d) in registration.named
                ),
            )
        )
    return sites


def _sheet(
    sites: Sequence[SiteImages],
    registration: Registration,
    strata: tuple[str, ...],
    classes: tuple[str, ...],
    options: DataOptions,
) -> dict[str, Any]:
    used = {site.name: set(site.digests) for site in sites}
    by_site = {
        site.name: sheet.site_sheet(
            [fact for fact in files.entry.facts if fact.digest in used[site.name]],
            site.labels,
            site.groups,
            site.split,
            strata,
            [problem for problem in registration.problems if problem.site == site.name],
        )
        for site, files in zip(sites, registration.sites, strict=True)
    }
    kinds = {"labels": ("findings", sheet.findings_sheet), "boxes": ("boxes", sheet.boxes_sheet)}
    if options.target in kinds:
        key, counts = kinds[options.target]
        for site in sites:
            if site.targets is not None:
                by_site[site.name][key] = counts(np.asarray(site.targets[np.arange(len(site.labels))]), classes)
    warnings = sheet.class_warnings(by_site, strata, options.min_per_class)
    warnings += sheet.site_warnings(by_site, classes=options.target == "label")
    unnamed = [files.name for files in registration.sites if not any(row.patient for row in files.rows)]
    if unnamed:
        warnings.append(
            f"No patient is named at {', '.join(unnamed)}: every image counts as a patient of its own, so images of "
            "one patient may be in train and in test."
        )
    if registration.shared_pictures:
        warnings.append(f"Pictures that occur at more than one site: {registration.shared_pictures}.")
    if registration.shared_patients:
        warnings.append(
            f"Patients (by name) that occur at more than one site: {registration.shared_patients}; each counts as "
            "one person and is in the same split everywhere."
        )
    return {
        "sites": by_site,
        "warnings": warnings,
        "shared_pictures": registration.shared_pictures,
        "shared_patients": registration.shared_patients,
    }


def _digest(classes: tuple[str, ...], sites: Sequence[SiteImages]) -> str:
    sha = hashlib.sha256(json.dumps(classes).encode())
    for site in sites:
        rows: list[Any] = [site.digests, site.labels.tolist(), site.groups.tolist(), site.split.tolist()]
        rows += [site.target_digests] if site.targets is not None else []
        sha.update(json.dumps([site.name, *rows]).encode())
    return sha.hexdigest()

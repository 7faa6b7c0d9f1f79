"""Several findings an image: read from a table, written as numbers, and what such images are drawn by.

Shapes: N images of a site, K findings.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np

from confrere.data.options import DataOptions
from confrere.data.paths import check_class_name
from confrere.data.register import Registration, SiteFiles
from confrere.data.sources import UNKNOWN, Listing, names_of
from confrere.errors import DataError

NONE = "no finding"
"""What images without any are drawn by."""


def findings_of(cell: str) -> tuple[str, ...]:
    """Return the findings of a cell, sorted: names between ``|`` or ``;``, a ``?`` before one that is not known.

    Raises:
        ValueError: one is named twice. DataError: a name cannot be used.

    >>> findings_of("nodule; ?effusion")
    ('?effusion', 'nodule')
    """
    marked = [part.strip() for part in re.split(r"[|;]", cell) if part.strip()]
    bare = [check_class_name(name.removeprefix(UNKNOWN).strip()) for name in marked]
    if len(set(bare)) < len(bare):
        raise ValueError("a finding is named twice")
    return tuple(sorted(name.startswith(UNKNOWN) * UNKNOWN + one for name, one in zip(marked, bare, strict=True)))


def names(listing: Listing, options: DataOptions) -> tuple[str, ...]:
    """Return the findings that are learnt: as agreed, or those that the table names.

    Raises:
        DataError: the table names one that was not agreed, or there are fewer than two.
    """
    found = sorted({name for row in listing.rows for name in names_of(row)})
    agreed = options.classes or listing.classes
    refuse_unknown(found, agreed, listing.name)
    if agreed is None and len(found) < 2:
        fix = "name at least two in the column labels, or learn one label an image"
        raise DataError("there are fewer than two findings", where=listing.name, fix=fix, code="classes")
    return agreed or tuple(found)


def refuse_unknown(found: list[str], agreed: tuple[str, ...] | None, where: str) -> None:
    """Raise DataError when the data name a class that was not agreed."""
    unknown = sorted(set(found) - set(agreed)) if agreed else []
    if unknown:
        what = f"the data have the class {unknown[0]!r}, which the list of classes lacks"
        raise DataError(what, where=where, fix="add it to data.classes, or map it by data.class_map", code="classes")


def with_findings(registration: Registration, classes: tuple[str, ...]) -> Registration:
    """Return the registration with findings (N, K) as targets: 1 there, 0 not there, -1 not known.

    An image's label becomes its rarest finding at its site, of equally rare ones the first: by it images are split and
    drawn.
    """
    return replace(registration, sites=tuple(_with_findings(site, classes) for site in registration.sites))


def _with_findings(site: SiteFiles, classes: tuple[str, ...]) -> SiteFiles:
    index = {name: k for k, name in enumerate(classes)}
    truth = np.zeros((len(site.rows), len(classes)), np.float32)
    for i, row in enumerate(site.rows):
        for name in row.labels or ():
            truth[i, index[name.removeprefix(UNKNOWN)]] = -1 if name.startswith(UNKNOWN) else 1
    counts = (truth == 1).sum(0)
    rarest = [min(np.flatnonzero(one == 1), key=lambda k: (counts[k], k), default=None) for one in truth]
    labels = [NONE if k is None else classes[k] for k in rarest]
    rows = tuple(replace(row, label=label) for row, label in zip(site.rows, labels, strict=True))
    told = tuple(hashlib.sha256(repr(row.labels).encode()).hexdigest() for row in rows)
    return replace(site, rows=rows, targets=truth, target_digests=told)

"""Tables of numbers: one row a patient, with ``site,label`` and features; optionally ``patient`` and ``split``.

No statistic crosses sites: every site fills gaps with its own median and standardises with its own mean and standard
deviation, all of training rows only, or with constants that are given. Every feature is followed by whether it was
missing, at every site alike, so that not even the set of gaps need be agreed upon.

Shapes: N rows, F features; the model sees (N, 1, 2 F) float32: F values, then F indicators.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confrere.data.cache import Entry, Fact
from confrere.data.images import Federation
from confrere.data.options import DataOptions
from confrere.data.paths import check_class_name, site_id, slug
from confrere.data.register import Registration, SiteFiles, number_groups, of_one
from confrere.data.sources import Listing, Problem, Row
from confrere.data.splits import TRAIN
from confrere.data.table import EVENTS, SPLITS, TARGETS, collect, read_rows, time_of
from confrere.errors import DataError

_RESERVED = ("site", "label", "patient", "lesion", "split")
_OF_TIME = ("time", "event")
_MISSING = {"", "?", "na", "n/a", "nan", "none", "null"}
_FAR = 10.0  # standard deviations: beyond, a site of few rows would drown the rest


def holds_numbers(path: Path, options: DataOptions) -> bool:
    """Return whether ``path`` is a CSV with labels, without a column ``path``, whose first row holds numbers."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    try:
        _, cells = next(iter(read_rows(path, TARGETS[options.target])), (0, {}))
        values = [_number(cells[name]) for name in cells if name not in (*_reserved(options), _dealt_by(options))]
    except (DataError, ValueError):
        return False
    return "path" not in cells and any(not math.isnan(value) for value in values)


def _reserved(options: DataOptions) -> tuple[str, ...]:
    """Return the columns that are no features."""
    return (*_RESERVED, *(_OF_TIME if options.target == "time" else ()))


def _dealt_by(options: DataOptions) -> str | None:
    """Return the column that names the site of a pooled set, if one does."""
    how = options.partition
    return how.column.strip().lower() if how and how.column else None


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A table as read: its rows, and by a row's name the SHA-256 and the values (F,), NaN where missing."""

    listing: Listing
    digests: Mapping[str, str]
    values: Mapping[str, tuple[float, ...]]

    def hash_rows(self, listing: Listing) -> tuple[dict[Row, str], list[Problem]]:
        """Return the digest of each row of ``listing``, whose labels may have been mapped."""
        return {row: self.digests[row.name] for row in listing.rows}, []

    def register(self, hashes: Mapping[Row, str]) -> Registration:
        """Return the rows by site, in the order of their digests, with opaque patient numbers."""
        by_site: dict[str, list[Row]] = defaultdict(list)
        for row in sorted(hashes, key=lambda row: hashes[row]):
            by_site[row.site].append(row)
        seen = Counter(p for rows in by_site.values() for p in {row.patient for row in rows if row.patient})
        groups = number_groups(hashes)
        return Registration(
            sites=tuple(self._site(name, rows, hashes) for name, rows in sorted(by_site.items())),
            problems=(),
            groups=groups,
            named=of_one(hashes, groups),
            shared_pictures=0,
            shared_patients=sum(count > 1 for count in seen.values()),
        )

    def _site(self, name: str, rows: Sequence[Row], hashes: Mapping[Row, str]) -> SiteFiles:
        array = np.array([[self.values[row.name]] for row in rows], dtype=np.float32)
        none, width = (0.0, 0.0, 0.0), array.shape[2]
        facts = (
            Fact(digest=hashes[row], format="numbers", width=width, height=1, mean=none, square=none) for row in rows
        )
        return SiteFiles(name=name, rows=tuple(rows), entry=Entry(images=array, facts=tuple(facts), bad={}))


def read_numbers(path: Path, options: DataOptions) -> Numbers:
    """Read a CSV file of numbers; every column but site, label, patient, lesion, split (time, event) is a feature.

    A gap is an empty cell, ``?``, ``NA`` or ``NaN``. Equal rows are different patients unless ``patient`` says
    otherwise. Neither the order of the rows nor that of the sites changes anything; the order of the columns does.

    Raises:
        DataError: encoding, header, a missing column or cell, a split in some rows only, or a cell that is no number,
            by line.
    """
    pooled, column = options.partition is not None, _dealt_by(options)
    needed = [*TARGETS[options.target], *([] if pooled else ["site"]), *([column] if column else [])]
    header = next(iter(read_rows(path, needed)), (0, dict[str, str]()))[1]
    columns = tuple(name for name in header if name not in (*_reserved(options), column))
    seen: dict[str, str] = {}
    made = collect(path, needed, lambda cells: _row(path, cells, columns, options, seen))
    if len({row.split is None for row, _ in made}) == 2:
        raise DataError(
            "only some rows have a split", where=path.name, fix="fill the column, or remove it", code="splits"
        )
    rows, digests, repeats = [], {}, Counter[str]()
    for index, (row, values) in enumerate(made):
        told = (row.site, row.label, row.patient, row.attribute, values)
        text = repr(told if row.time is None else (*told, row.time))
        repeats[text] += 1  # equal rows are told apart by their number, so that order does not matter
        rows.append(replace(row, name=f"row {index + 1}"))
        digests[rows[-1].name] = hashlib.sha256(f"{text}|{repeats[text]}".encode()).hexdigest()
    listing = Listing(name=slug(path.stem), rows=tuple(rows), columns=columns)
    by_name = {row.name: numbers for row, (_, numbers) in zip(rows, made, strict=True)}
    return Numbers(listing=listing, digests=digests, values=by_name)


def _row(
    path: Path,
    cells: Mapping[str, str],
    columns: Sequence[str],
    options: DataOptions,
    seen: dict[str, str],
) -> tuple[Row, tuple[float, ...]]:
    split = cells.get("split", "").lower()
    if split and split not in SPLITS:
        raise ValueError("split is not train, val or test")
    time, column = time_of(cells) if options.target == "time" else None, _dealt_by(options)
    row = Row(
        path=path,
        name="",
        site="" if options.partition is not None else site_id(cells["site"], seen),
        label=EVENTS[time[1]] if time else check_class_name(cells["label"]),
        time=time,
        patient=cells.get("patient") or cells.get("lesion") or None,
        split=SPLITS[split] if split else None,
        attribute=cells[column] if column else None,
    )
    values = []
    for name in columns:
        try:
            values.append(_number(cells[name]))
        except ValueError:
            raise ValueError(f"{name} is no number") from None
    return row, tuple(values)


def _number(cell: str) -> float:
    """Return a cell's number, NaN for a gap; ValueError for anything else, infinity included."""
    if cell.lower() in _MISSING:
        return math.nan
    value = float(cell.replace("_", " "))  # Python reads 1_0 as ten; nobody else does
    if not abs(value) < 1e30:
        raise ValueError("not a finite number")
    return value


def standardise(
    rows: NDArray[np.float32],
    train: NDArray[np.bool_],
    columns: Sequence[str] = (),
    constants: Mapping[str, tuple[float, float]] | None = None,
) -> NDArray[np.float32]:
    """Return rows (N, 1, F) as (N, 1, 2 F): filled and standardised values, cut at 10 sd, then 1 where one was missing.

    Args:
        rows: NaN where missing.
        train: (N,), the rows that statistics are taken of.
        columns: names of the F features, needed for ``constants``.
        constants: column -> (mean, sd) used instead of the training rows' own.

    A column without any training value is 0 throughout; one that is constant is centred only.
    """
    values = rows[:, 0].astype(np.float64)
    missing = np.isnan(values)
    out = np.zeros_like(values)
    for index in range(values.shape[1]):
        known = values[train & ~missing[:, index], index]
        given = (constants or {}).get(columns[index]) if columns else None
        if given is None and not len(known):
            continue
        mean, sd = given or (float(known.mean()), float(known.std()))
        median = float(np.median(known)) if len(known) else mean
        filled = np.where(missing[:, index], median, values[:, index])
        out[:, index] = np.clip((filled - mean) / (sd if sd > 1e-12 else 1.0), -_FAR, _FAR)
    return np.concatenate([out, missing], axis=1)[:, None].astype(np.float32)


def standardised(
    federation: Federation, columns: Sequence[str], constants: Mapping[str, tuple[float, float]]
) -> Federation:
    """Return a federation of raw numbers with every site's rows standardised by its own training rows.

    Raises:
        DataError: constants for a column that is not there, or a standard deviation that is not positive.
    """
    for name, (mean, sd) in constants.items():
        if name not in columns or not (math.isfinite(mean) and 0 < sd < math.inf):
            raise DataError(
                f"the constants of {name!r} are for no column, or no mean and positive standard deviation",
                where="data.constants",
                fix=f"the columns are {', '.join(columns)}",
                code="table-constants",
            )
    sites = tuple(
        replace(site, images=standardise(np.asarray(site.images[:]), site.split == TRAIN, columns, constants))
        for site in federation.sites
    )
    sheet = {**federation.sheet, "sites": {name: dict(entry) for name, entry in federation.sheet["sites"].items()}}
    for site in federation.sites:
        entry = sheet["sites"][site.name]
        del entry["channel_mean"], entry["channel_std"]  # of pixels
        entry["missing_values"] = f"{float(np.isnan(np.asarray(site.images[:])).mean()):.0%}"
    return replace(federation, sites=sites, image_size=(1, 2 * len(columns)), sheet=sheet)

"""Tables: one row an image (``path,label,site,patient`` or ``lesion``, optionally ``split``)."""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from confrere import intake
from confrere.data.boxes import boxes_of
from confrere.data.findings import findings_of
from confrere.data.options import Target
from confrere.data.paths import Root, check_class_name, site_id, slug
from confrere.data.sources import Listing, Row, SplitName
from confrere.errors import DataError

SPLITS: dict[str, SplitName] = {"train": "train", "val": "val", "validation": "val", "test": "test"}
MOST_BYTES, MOST_COLUMNS = 100_000_000, 10_000
TARGETS: dict[Target, tuple[str, ...]] = {
    "label": ("label",),
    "labels": ("labels",),
    "mask": ("mask",),
    "boxes": ("boxes",),
    "time": ("time", "event"),
    "image": (),
}
ALL, EVENTS = "all", ("censored", "event")
"""What images without a label are called."""
MAY_BE_EMPTY = ("labels", "boxes")
"""Columns of which an empty cell says that there is nothing."""
_SHOWN = 5
_KNOWN = ("path", "label", "labels", "mask", "boxes", "time", "event", "site", "patient", "lesion", "split")
_OTHERS = ("file", "sha256")
T = TypeVar("T")


def read_table(
    path: Path, *, pooled: bool = False, column: str | None = None, site: str | None = None, target: Target = "label"
) -> Listing:
    """List the rows of a CSV file; image paths are relative to it.

    Args:
        path: the table.
        pooled: the rows name no site yet (a partition will).
        column: further column to keep, for a partition by attribute.
        site: all rows belong to this site and a ``site`` column is not read.
        target: ``mask``: a column ``mask`` names every image's mask; ``boxes``: a column ``boxes``, or else ``mask``;
            ``time``: columns ``time`` and ``event``. Then ``label`` may be missing, and only stratifies. ``labels``: a
            column ``labels``, and ``label`` is not read. ``image``: there may be labels, which are not read.

    Raises:
        DataError: encoding, header, a missing column or cell, or a path that leaves the folder, by line.
    """
    needed = ["path", *_of_target(path, target)]
    needed += ["site"] if not pooled and site is None else []
    needed += [column.strip().lower()] if column else []
    root = Root(path.parent)
    seen: dict[str, str] = {}
    rows = tuple(collect(path, needed, lambda cells: _row(root, cells, pooled, column, site, seen, target)))
    if not rows:
        raise DataError(
            "the table has no rows", where=path.name, fix="write one line an image below the header", code="table-rows"
        )
    if len({row.split is None for row in rows}) == 2:
        raise DataError(
            "only some rows have a split", where=path.name, fix="fill the column, or remove it", code="splits"
        )
    return Listing(name=slug(path.stem), rows=rows)


def _of_target(path: Path, target: Target) -> tuple[str, ...]:
    """Return the columns that hold the target: boxes may be drawn around masks."""
    header = next(read_rows(path, ()), (0, dict[str, str]()))[1] if target == "boxes" else {}
    return ("mask",) if "mask" in header and "boxes" not in header else TARGETS[target]


def read_patients(path: Path) -> dict[str, str]:
    """Return ``{file: patient}`` of a ``patients.csv`` with the columns ``file`` and ``patient``."""
    root = Root(path.parent)

    def pair(cells: dict[str, str]) -> tuple[str, str]:
        root.join(cells["file"])
        return cells["file"], cells["patient"]

    return dict(collect(path, ["file", "patient"], pair))


def _row(
    root: Root,
    cells: dict[str, str],
    pooled: bool,
    column: str | None,
    site: str | None,
    seen: dict[str, str],
    target: Target,
) -> Row:
    split = cells.get("split", "").lower()
    if split and split not in SPLITS:
        raise ValueError("split is not train, val or test")
    time = time_of(cells) if target == "time" else None
    # Empty only where another target counts; events must not all fall into one split.
    named = cells.get("label") if target not in ("image", "labels") else None
    label = check_class_name(named or (EVENTS[int(time[1])] if time else ALL))
    labels = findings_of(cells["labels"]) if target == "labels" else None
    return Row(
        path=root.join(cells["path"]),
        name=cells["path"],
        site="" if pooled else site if site is not None else site_id(cells["site"], seen),
        label=label if labels is None else "|".join(labels),
        labels=labels,
        boxes=boxes_of(cells["boxes"]) if target == "boxes" and "boxes" in cells else None,
        patient=cells.get("patient") or cells.get("lesion") or None,
        split=SPLITS[split] if split else None,
        mask=root.join(cells["mask"]) if cells.get("mask") else None,
        time=time,
        attribute=cells[column.strip().lower()] if column else None,
    )


def time_of(cells: Mapping[str, str]) -> tuple[float, int]:
    """Return time and event of a row; ValueError, which quotes nothing, for all but a positive number and 0 or 1."""
    try:
        time, event = float(cells["time"].replace("_", " ")), float(cells["event"].replace("_", " "))
    except ValueError:
        raise ValueError("time or event is no number") from None
    if not 1e-30 < time < 1e30:  # what float32 keeps
        raise ValueError("time is not a positive number")
    if event not in (0.0, 1.0):
        raise ValueError("event is neither 1 (seen) nor 0 (censored)")
    return time, int(event)


def collect(path: Path, needed: list[str], make: Callable[[dict[str, str]], T]) -> list[T]:
    """Turn every line into a ``T``; faults of up to five lines are reported together."""
    made: list[T] = []
    faults: list[str] = []
    for line, cells in read_rows(path, needed):
        try:
            empty = [name for name in needed if not cells[name] and name not in MAY_BE_EMPTY]
            if empty:
                raise ValueError(f"{empty[0]} is empty")
            made.append(make(cells))
        except ValueError as error:
            faults.append(f"line {line}: {error}")
        except DataError as error:
            faults.append(f"line {line}: {error.what}")
        if len(faults) == _SHOWN:
            break
    if faults:
        raise DataError("; ".join(faults), where=path.name, fix="mend these lines", code="table-rows")
    return made


def read_rows(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield ``(line number, {column: cell})``; column names are lower case, blank lines are skipped.

    Raises:
        DataError: not UTF-8, a broken or repeated header, a column missing, a ragged or unreadable line.
    """
    data = _bytes(path)
    first = data[:100_000].split(b"\n", 1)[0].decode(errors="replace")
    delimiter = max(",;\t", key=first.count)
    if first.count(delimiter) >= MOST_COLUMNS:
        raise _too_wide(path)
    # Decoded as it is read: a string in memory may take four bytes a character.
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        _check_header(path, header, needed)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}",
                    where=path.name,
                    fix="put cells that hold a comma in double quotes",
                    code="table-rows",
                )
            yield reader.line_num, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num} is not valid CSV: {error}",
            where=path.name,
            fix="check its quotes",
            code="table-rows",
        ) from error


def _check_header(path: Path, header: list[str], needed: Iterable[str]) -> None:
    if len(header) > MOST_COLUMNS:
        raise _too_wide(path)
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        named = _shown(header, repeated[0])
        raise DataError(
            f"the header has {named} twice", where=path.name, fix="rename or remove one", code="table-header"
        )
    for name in needed:
        if name not in header:
            near = difflib.get_close_matches(name, header, n=1, cutoff=0.5)
            hint = f"rename column {header.index(near[0]) + 1} to {name!r}" if near else f"add a column {name!r}"
            raise DataError(f"the column {name!r} is missing", where=path.name, fix=hint, code="table-header")


def _shown(header: list[str], name: str) -> str:
    """Return a name that this program knows, else its place: in a table without header it may be a patient's."""
    return repr(name) if name in (*_KNOWN, *_OTHERS) else f"the name of column {header.index(name) + 1}"


def _too_wide(path: Path) -> DataError:
    what, fix = f"the header has more than {MOST_COLUMNS:,} columns", "leave out what is not needed"
    return DataError(what, where=path.name, fix=fix, code="table-rows")


def _bytes(path: Path) -> bytes:
    """Return a table's bytes, which are UTF-8 without zeros."""
    try:
        data = intake.read_bytes(path, MOST_BYTES)
    except OSError as error:
        fix = "give a CSV file"
        raise DataError(
            f"cannot read the table: {error.strerror}", where=path.name, fix=fix, code="unreadable-file"
        ) from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in data[:4096]:
        raise DataError(
            "the table is UTF-16 or binary", where=path.name, fix="save it as CSV in UTF-8", code="encoding"
        )
    zero = data.find(b"\x00")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise DataError(
            f"line {line} holds a zero byte", where=path.name, fix="save the table in UTF-8", code="encoding"
        )
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"line {line} is not UTF-8", where=path.name, fix="save the table in UTF-8", code="encoding"
        ) from error
    return data

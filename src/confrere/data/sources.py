"""What every source of images yields: rows that point to files, and what could not become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from confrere.data.options import DataOptions, Partition
from confrere.data.paths import Root
from confrere.errors import DataError

SplitName = Literal["train", "val", "test"]
Box = tuple[float, float, float, float, str]
"""Left, top, right and bottom in pixels of the file, and the name of the class."""
UNKNOWN = "?"
"""Stands before the name of a finding of which nobody said whether it is there."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One labelled file. ``name`` is shown to the local user only; ``patient`` never leaves this package.

    ``labels``: findings, sorted, where there may be several; ``label`` then holds them all.
    """

    path: Path
    name: str
    site: str
    label: str
    patient: str | None = None
    split: SplitName | None = None
    attribute: str | None = None
    mask: Path | None = None
    time: tuple[float, int] | None = None
    labels: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One file that is not used, and why; ``name`` is shown to the local user only."""

    site: str
    name: str
    reason: str


def names_of(row: Row) -> tuple[str, ...]:
    """Return the classes that a row names."""
    if row.labels is not None:
        return tuple(name.removeprefix(UNKNOWN) for name in row.labels)
    return (row.label,) if row.boxes is None else tuple(box[4] for box in row.boxes)


def renamed(row: Row, names: Mapping[str, str]) -> Row:
    """Return a row whose classes go by other names."""
    if row.boxes is not None:
        return replace(row, boxes=tuple((*box[:4], names.get(box[4], box[4])) for box in row.boxes))
    if row.labels is None:
        return replace(row, label=names.get(row.label, row.label))
    marks = [(name.startswith(UNKNOWN) * UNKNOWN, name.removeprefix(UNKNOWN)) for name in row.labels]
    found = tuple(sorted({mark + names.get(name, name) for mark, name in marks}))
    return replace(row, labels=found, label="|".join(found))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All files of a federation before any is opened; ``site`` is empty in a set that is still pooled.

    ``columns`` names the features of a table of numbers, whose rows are no files.
    """

    name: str
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...] = ()
    classes: tuple[str, ...] | None = None
    class_map: Mapping[str, str] = field(default_factory=dict)
    partition: Partition | None = None
    synthetic: bool = False
    columns: tuple[str, ...] = ()


def read_listing(path: Path, options: DataOptions) -> Listing:
    """List the files of ``path``: a folder, a CSV table or a ``federation.toml``.

    Raises:
        DataError: the path does not exist or is none of these, or its contents do not fit.
    """
    try:
        return _listing(path, options)
    except OSError as error:
        fix = "mend the path or its permissions"
        raise DataError(
            f"the data cannot be read: {error.strerror}", where=path.name, fix=fix, code="unreadable-file"
        ) from error


def _listing(path: Path, options: DataOptions) -> Listing:
    from confrere.data import folder, manifest, table

    if path.is_dir():
        if not Root(path).holds(path / "federation.toml"):
            fix = "copy it there, or give its own path"
            raise DataError(
                "federation.toml is a link that leads out of the data",
                where=path.name,
                fix=fix,
                code="path-leaves-data",
            )
        if (path / "federation.toml").is_file():
            return manifest.read_manifest(
                path / "federation.toml", target=options.target, volumes=options.volume is not None
            )
        return folder.read_folder(
            path, pooled=options.partition is not None, target=options.target, volumes=options.volume is not None
        )
    if not path.is_file():
        raise DataError(
            "there is no such folder or file", where=path.name, fix="check the path of the data", code="no-such-path"
        )
    if path.suffix.lower() == ".toml":
        return manifest.read_manifest(path, target=options.target, volumes=options.volume is not None)
    if path.suffix.lower() == ".csv":
        how = options.partition
        column = how.column if how else None
        return table.read_table(path, pooled=how is not None, column=column, target=options.target)
    raise DataError(
        f"a {path.suffix or 'file without a suffix'} is not a federation",
        where=path.name,
        fix="give a folder <site>/<class>/<image>, a .csv table or a federation.toml",
        code="no-such-path",
    )

"""``federation.toml``: names, classes and sites of a federation, or a pooled set and how to deal it out."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from confrere import intake
from confrere.data import folder, table
from confrere.data.options import Partition, Target
from confrere.data.paths import Root, check_class_name, check_site_name
from confrere.data.sources import Listing
from confrere.errors import DataError


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Head(_Strict):
    name: str = Field(min_length=1, max_length=100)
    task: Literal["classification", "multi-label", "segmentation", "detection", "survival"] = "classification"
    classes: tuple[str, ...] | None = Field(default=None, min_length=2)
    synthetic: StrictBool = False


class _Site(_Strict):
    name: str
    path: str


class _Pool(_Strict):
    path: str


class _Manifest(_Strict):
    federation: _Head
    class_map: dict[str, str] = {}
    site: tuple[_Site, ...] = ()
    pool: _Pool | None = None
    partition: Partition | None = None


def read_manifest(path: Path, *, target: Target = "label", volumes: bool = False) -> Listing:
    """List the files that a ``federation.toml`` names; its paths are relative to it and stay below it.

    ``[[site]]`` gives ``name`` and ``path``, a folder of classes or a table; instead of sites, ``[pool]``
    gives one ``path`` and ``[partition]`` says how to deal it out. ``target``: what a model learns.

    Raises:
        DataError: TOML that does not parse, an unknown or missing key, a path that leaves the folder.
    """
    manifest = _parse(path)
    root = Root(path.parent)
    if (manifest.pool is None) != (manifest.partition is None) or (manifest.pool is None) != bool(manifest.site):
        raise DataError(
            "give either [[site]] entries, or [pool] and [partition]",
            where=path.name,
            fix='e.g. [[site]] name = "st_mary", path = "st_mary"',
            code="federation-file",
        )
    if manifest.pool is not None and manifest.partition is not None:
        parts = [_read_pool(root, manifest.pool.path, manifest.partition, path.name, target, volumes)]
    else:
        names = [check_site_name(site.name, where=path.name) for site in manifest.site]
        if len(set(names)) < len(names):
            raise DataError("two sites have the same name", where=path.name, fix="rename one", code="federation-file")
        parts = [_read_site(root, site, path.name, target, volumes) for site in manifest.site]
    head = manifest.federation
    for name in head.classes or ():
        check_class_name(name, where=path.name)
    if head.classes is not None and len(set(head.classes)) < len(head.classes):
        raise DataError(
            "a class is listed twice", where=path.name, fix="remove one from classes", code="federation-file"
        )
    return Listing(
        name=head.name,
        rows=tuple(row for part in parts for row in part.rows),
        problems=tuple(problem for part in parts for problem in part.problems),
        classes=head.classes,
        class_map=manifest.class_map,
        partition=manifest.partition,
        synthetic=head.synthetic,
    )


def _parse(path: Path) -> _Manifest:
    try:
        return _Manifest.model_validate(intake.parse_toml(intake.read_bytes(path, intake.MOST_TOML)))
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror}", where=path.name, fix="mend the path", code="unreadable-file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8", where=path.name, fix="save it in UTF-8", code="encoding") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{key}: {first['msg']}", where=path.name, fix=_hint(first["loc"]), code="federation-file"
        ) from error
    except ValueError as error:
        raise DataError(f"not valid TOML: {error}", where=path.name, fix="mend the line", code="not-toml") from error


def _hint(location: tuple[int | str, ...]) -> str:
    """Return the nearest valid key."""
    models: dict[str, type[BaseModel]] = {
        "federation": _Head, "site": _Site, "pool": _Pool, "partition": Partition,
    }  # fmt: skip
    model = models.get(str(location[0]), _Manifest) if len(location) > 1 else _Manifest
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(model.model_fields)}"


def _read_site(root: Root, site: _Site, where: str, target: Target, volumes: bool) -> Listing:
    path = _resolve(root, site.path, f"{where}, site {site.name}")
    if path.is_dir():
        return folder.read_site(path, site.name, target=target, volumes=volumes)
    return table.read_table(path, site=site.name, target=target)


def _read_pool(root: Root, name: str, how: Partition, where: str, target: Target, volumes: bool) -> Listing:
    path = _resolve(root, name, where)
    if not path.is_dir():
        return table.read_table(path, pooled=True, column=how.column, target=target)
    if how.column is not None:
        raise DataError(
            "a folder has no columns to partition by",
            where=where,
            fix="give a table, or another by",
            code="federation-file",
        )
    return folder.read_folder(path, pooled=True, target=target, volumes=volumes)


def _resolve(root: Root, name: str, where: str) -> Path:
    try:
        path = root.join(name)
    except ValueError as error:
        raise DataError(
            f"a {error}", where=where, fix="keep the data below this file", code="federation-file"
        ) from error
    if not path.is_dir() and path.suffix.lower() != ".csv":
        raise DataError(
            "a path is neither a folder nor a .csv table", where=where, fix="mend the path", code="path-leaves-data"
        )
    return path

"""From a plan and sites' tables to a folder of anonymised ones, their mapping and a statement: all or nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.anonymise.attacks import Target, check_strangers, intersection, membership
from confrere.anonymise.generalise import anonymise, losses
from confrere.anonymise.mapping import as_mapping, assign, entries, mapped_items, read_mapping, unite
from confrere.anonymise.plan import Plan, read_plan
from confrere.anonymise.records import Records, read_records
from confrere.anonymise.statement import as_markdown, as_statement
from confrere.anonymise.table import as_csv, cells, check_size, csv_bytes, examine, rows_of
from confrere.data.paths import new_folder, slug
from confrere.errors import ConfigError, DataError, RunError
from confrere.record.files import as_json, write_bytes, write_files

RESERVED = "mapping", "statement"


def write_release(plan: Path, tables: Sequence[Path], out: Path, *, strangers: Path | None = None) -> dict[str, Any]:
    """Anonymise every table by itself, check what would be written, and write it into the new folder ``out``.

    Args:
        plan: TOML file, see :mod:`confrere.anonymise.plan`.
        tables: a CSV a site; its name is the file's.
        out: gets ``SITE.csv``, ``SITE.mapping.json``, ``mapping.json`` (the union), ``statement.json`` and ``.md``.
        strangers: a CSV of people who are in none of the tables, for the attack on membership.

    Returns:
        The statement.

    Raises:
        ConfigError: the plan, or a table's name. DataError: a table, or ``out`` holds something. RunError: what would
            be written does not hold what was asked, which is our fault; or ``out`` cannot be written.
    """
    asked = read_plan(plan)
    others = read_records(strangers, asked) if strangers else None
    if strangers and others:
        check_strangers(others, strangers.name)
    names: dict[str, int] = {}
    targets: dict[str, Target] = {}
    for table in tables:
        site = slug(table.stem)
        if site in targets or site in RESERVED:
            what, fix = "two tables have one name, or one that is reserved", "rename a file: its name is the site's"
            raise ConfigError(what, where=table.name, fix=fix, code="named-twice")
        records = read_records(table, asked, names=names if asked.patient else None)
        check_size(asked, records, table.name)
        targets[site] = Target(asked, records, anonymise(asked, records, where=table.name))
    files, told = _examined(asked, targets)
    attacks = _attacked(targets, others)
    statement = as_statement(asked, told["sites"], told["union"], attacks, time.strftime("%Y-%m-%d"))
    files["mapping.json"] = as_json(as_mapping(asked, {site: one.release for site, one in targets.items()}))
    files |= {"statement.json": as_json(statement), "statement.md": as_markdown(statement).encode()}
    with new_folder(out) as draft:
        write_files(draft, files)
    return statement


def _examined(plan: Plan, targets: Mapping[str, Target]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of every site, and what counting their cells says, of each and of all together."""
    files: dict[str, bytes] = {}
    sites: dict[str, Any] = {}
    everything: list[tuple[str, ...]] = []
    units: list[NDArray[np.int64]] = []
    for site, one in targets.items():
        rows = rows_of(plan, one.records, one.release)
        counted = {"rows": len(rows), "units": len(np.unique(one.records.units)), "outside": one.records.outside}
        sites[site] = {**counted, **_holding(plan, rows, one.records.units, site)}
        sites[site]["losses"] = losses(plan, one.records, one.release)
        files[f"{site}.csv"] = as_csv(plan, rows)
        files[f"{site}.mapping.json"] = as_json(as_mapping(plan, {site: one.release}))
        units.append(one.records.units + (0 if plan.patient else len(everything)))
        everything += rows
    union = _holding(plan, everything, np.concatenate(units), "all tables together")
    return files, {"sites": sites, "union": union}


def _holding(plan: Plan, rows: list[tuple[str, ...]], units: NDArray[np.int64], where: str) -> dict[str, Any]:
    counted = examine(plan, rows, units)
    if not counted["holds"]:
        what = f"what would be written holds a class of {counted['smallest_class']} or a set of items of "
        what += f"{counted['smallest_support']} {plan.unit}, k is {plan.k}"
        raise RunError(what, where=where, fix="nothing was written; report this", code="anonymity-check")
    return counted


def _attacked(targets: Mapping[str, Target], strangers: Records | None) -> dict[str, Any]:
    """Return what attacks found: of each two sites that share patients, and of each site against strangers."""
    found: dict[str, Any] = {}
    names = sorted(targets)
    for first, here in enumerate(names):
        for there in names[first + 1 :] if targets[here].plan.patient else []:
            told = intersection(targets[here], targets[there])
            found |= {f"{here} and {there} intersected": told} if told is not None else {}
    if strangers is not None:
        for name in names:
            told = membership(targets[name], targets[name].records, strangers)
            found[f"membership in {name}"] = told
    return found


def write_mapped(plan: Path, table: Path, mappings: Sequence[Path], out: Path) -> int:
    """Write new records as the classes of a union of mappings show them, in the order of ``table``; return how many.

    Args:
        plan: the one that the mappings were made with.
        table: a CSV of new records; target and patient are not needed.
        mappings: of sites, or their union.
        out: the CSV to write.

    Raises:
        ConfigError, DataError: the plan, the table or a mapping cannot be used, or ``out`` is there already.
    """
    asked = read_plan(plan)
    if out.exists():
        raise DataError("the file is there already", where=str(out), fix="choose another one", code="not-empty")
    classes = entries(asked, unite([read_mapping(path) for path in mappings]))
    records = read_records(table, asked, new=True)
    of = assign(asked, records, classes)
    items = mapped_items(asked, records, classes, of)
    boxes = [classes[number].box for number in of]
    rows = (cells(asked, *one)[:-1] for one in zip(boxes, items, records.kept, strict=True))
    write_bytes(out, csv_bytes(asked.written[:-1], rows))
    return len(records)

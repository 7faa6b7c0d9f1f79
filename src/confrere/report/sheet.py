"""Arrange the data sheet of a federation for reading: a table of totals, a table of classes, and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from confrere.report.reading import Json, as_dict, as_list

COUNTS = {
    "findings": ("finding", "Images per finding"),
    "boxes": ("class", "Boxes per class, and images with at least one"),
}
"""Tables of counts beside that of the classes: what a row is called, and the caption."""


def arrange(sheet: Json, classes: list[str], called: str = "class") -> Json | None:
    """Return the sheet as tables, or None when there is none; keys it does not know are kept under "rest".

    Args:
        sheet: ``{"sites": {site: {key: value}}, "warnings": [...]}``.
        classes: names of the classes or strata; an entry keyed by these is a table of counts.
        called: what one of these is.
    """
    sites = {name: _by_split(as_dict(entry)) for name, entry in as_dict(sheet.get("sites")).items()}
    warnings = [str(warning) for warning in as_list(sheet.get("warnings"))]
    if not sites and not warnings:
        return None
    keys = list(dict.fromkeys(key for entry in sites.values() for key in entry))
    counted = next((key for key in keys if any(_is_counts(entry.get(key), classes) for entry in sites.values())), None)
    tables = [key for key in COUNTS if key != counted and any(as_dict(entry.get(key)) for entry in sites.values())]
    keys = [key for key in keys if key not in tables]
    flat = [key for key in keys if key != counted and all(_is_flat(entry.get(key)) for entry in sites.values())]
    rest = [key for key in keys if key not in flat and key != counted]
    rows = [{"name": name, "cells": [entry.get(key) for key in flat]} for name, entry in sites.items()]
    others = [{"name": name, "cells": [entry.get(key) for key in rest]} for name, entry in sites.items()]
    extra = {
        key: value for key, value in sheet.items() if key not in ("sites", "warnings") and value not in ({}, [], None)
    }
    return {
        "columns": [label(key) for key in flat],
        "rows": rows,
        "classes": _class_table(sites, counted, classes, called, f"Images per {called}") if counted else None,
        "counts": [_counts_table(sites, key) for key in tables],
        "rest": {"columns": [label(key) for key in rest], "rows": others} if rest else None,
        "extra": [[label(key), value] for key, value in extra.items()],
        "warnings": warnings,
    }


def label(key: str) -> str:
    """Return a key as words: ``bad_files`` is "Bad files"."""
    words = key.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _by_split(entry: Json) -> Json:
    """Return the entry with its splits as columns of their own: images / patients."""
    flat: Json = {}
    for key, value in entry.items():
        if key == "splits" and isinstance(value, dict):
            for split, counts in value.items():
                both = (as_dict(counts).get("images", "–"), as_dict(counts).get("patients", "–"))  # noqa: RUF001
                flat[f"{split}_images_/_patients"] = f"{both[0]} / {both[1]}"
        else:
            flat[key] = value
    return flat


def _is_flat(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 24)


def _is_counts(value: object, classes: list[str]) -> bool:
    return isinstance(value, dict) and bool(value) and set(value) <= set(classes)


def _class_table(sites: Mapping[str, Json], key: str, classes: list[str], called: str, caption: str) -> Json:
    table = [[_cell(as_dict(sites[site].get(key)).get(name)) for site in sites] for name in classes]
    parts = dict.fromkeys(split for row in table for cell in row for split in cell["parts"])
    rows = [{"name": name, "cells": row} for name, row in zip(classes, table, strict=True)]
    return {"sites": list(sites), "rows": rows, "parts": list(parts), "called": called, "caption": caption}


def _counts_table(sites: Mapping[str, Json], key: str) -> Json:
    names = list(dict.fromkeys(name for entry in sites.values() for name in as_dict(entry.get(key))))
    return _class_table(sites, key, names, *COUNTS[key])


def _cell(value: object) -> Json:
    """Return a count as its total and its parts by split; a part that is no number makes the sum unknown."""
    if not isinstance(value, dict):
        return {"total": 0 if value is None else value, "parts": {}}
    parts = {split: part for split, part in value.items() if split != "total"}
    whole = all(isinstance(part, int) for part in parts.values())
    return {"total": value.get("total", sum(parts.values()) if whole else None), "parts": parts}

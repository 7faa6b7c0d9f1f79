"""Read the files of a run directory: required ones or a clear error, optional ones or nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confrere.errors import RunError
from confrere.record.run import Run

Json = dict[str, Any]


def read_json(folder: Path, name: str) -> Json:
    """Return the JSON object in ``folder/name``.

    Raises:
        RunError: the file is missing, unreadable, not JSON or not an object.
    """
    path = folder / name
    if not path.is_file():
        raise RunError(
            f"{name} is missing",
            where=str(folder),
            fix="point at the directory of a finished run; an unfinished one can be resumed first",
            code="run-file",
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_undefined)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{name} cannot be read ({error})", where=str(folder), fix="run again", code="run-file"
        ) from error
    if not isinstance(value, dict):
        raise RunError(f"{name} is not a JSON object", where=str(folder), fix="run again", code="run-file")
    return value


def read_optional(folder: Path, name: str) -> Json | None:
    """Return the JSON object in ``folder/name``, or None when there is no such file."""
    return read_json(folder, name) if (folder / name).is_file() else None


def read_text(folder: Path, name: str) -> str | None:
    """Return the text of ``folder/name``, or None when there is no such file."""
    path = folder / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def read_events(folder: Path) -> list[Json] | None:
    """Return the journal's events that stand, or None without the file.

    Raises:
        RunError: a line was damaged or changed (its number is said).
    """
    return Run(folder).events() if (folder / "events.jsonl").is_file() else None


def need(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    """Return ``mapping[key]``.

    Raises:
        RunError: the key is missing; ``where`` names the file and the place in it.
    """
    if key not in mapping:
        raise RunError(
            f"the key {key!r} is missing", where=where, fix="run again with this version of confrere", code="run-file"
        )
    return mapping[key]


def number(value: object) -> float | None:
    """Return ``value`` as a finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def as_dict(value: object) -> Json:
    """Return ``value`` when it is a dict, else an empty one (an optional part that is missing or null)."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """Return ``value`` when it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def _undefined(_name: str) -> None:
    """Read NaN and infinities, which are no JSON, as undefined."""

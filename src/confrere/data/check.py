"""``confrere data check``: everything that can be said about the data before a run."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confrere.data.federation import build, examine
from confrere.data.options import DataOptions
from confrere.data.splits import NAMES
from confrere.errors import DataError, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_SIZE = (64, 64)
_SHOWN = 20


def check(path: Path, options: DataOptions, *, seed: int = 0) -> dict[str, Any]:
    """Read, decode, split and describe the data without keeping anything.

    Returns:
        ``ok``; ``error`` (what, where, fix, code) or None; ``problems``: one {site, name, reason} a file that is
        not used, with names for the local user only; and when ok: ``name``, ``synthetic``, ``classes``,
        ``digest`` and ``sheet`` (see :attr:`confrere.data.federation.Federation.sheet`).
    """
    report: dict[str, Any] = {"ok": False, "error": None, "problems": []}
    try:
        with tempfile.TemporaryDirectory(prefix="confrere-check-") as cache:
            listing, registration = examine(path, options, _SIZE, seed, Path(cache))
        report["problems"] = [asdict(problem) for problem in registration.problems]
        federation = build(listing, registration, options, seed, None)
    except DataError as error:
        return report | {"error": {"what": error.what, "where": error.where, "fix": error.fix, "code": error.code}}
    return report | {
        "ok": True,
        "name": federation.name,
        "synthetic": federation.synthetic,
        "classes": list(federation.classes),
        "digest": federation.digest,
        "sheet": federation.sheet,
    }


def render_check(report: dict[str, Any]) -> RenderableType:
    """Return what ``confrere data check`` prints of a :func:`check` result, for rich."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if "sheet" in report:
        kind = " (synthetic, not from patients)" if report["synthetic"] else ""
        parts.append(Text(f"{report['name']}{kind}", style="bold"))
        parts.append(render_sheet(report["sheet"]))
    if report["problems"]:
        parts.append(_problems_table(report["problems"]))
    if report["error"]:
        error = report["error"]
        where = f" [{error['where']}]" if error["where"] else ""
        parts.append(Text(f"{error['what']}{where}", style="bold red"))
        parts += [Text(f"Fix: {error['fix']}")] if error["fix"] else []
    else:
        parts.append(Text("The data can be used.", style="green"))
    return Group(*parts)


def render_sheet(sheet: dict[str, Any]) -> RenderableType:
    """Return the sites, the classes, findings or boxes at each site and the warnings of a data sheet, for rich."""
    from rich.console import Group
    from rich.text import Text

    warnings = [Text(f"Warning: {warning}", style="yellow") for warning in sheet["warnings"]]
    more = {"findings": "finding: present/absent/unknown", "boxes": "boxes: in all/images with one"}
    tables = (table for key, title in more.items() for table in _counts_tables(sheet, key, title))
    return Group(_sites_table(sheet), "", _classes_table(sheet), *tables, *warnings)


def _sites_table(sheet: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site", no_wrap=True)
    for title in ("images", "patients", *NAMES, "pixels", "left out", "copies"):
        table.add_column(title, justify="right")
    for name, site in sheet["sites"].items():
        table.add_row(
            name + (" *" if site["outlier"] else ""),
            str(site["images"]),
            str(site["patients"]),
            *(str(site["splits"][split]["images"]) for split in NAMES),
            f"{_range(site['original_width'])}x{_range(site['original_height'])}",
            str(sum(site["bad_files"].values()) + site["conflicts"]),
            str(site["duplicates"]),
        )
    return table


def _classes_table(sheet: dict[str, Any]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class: train/val/test")
    for name in sheet["sites"]:
        table.add_column(name, justify="right")
    for label in dict.fromkeys(label for site in sheet["sites"].values() for label in site["classes"]):
        cells = (site["classes"].get(label, {"total": 0}) for site in sheet["sites"].values())
        # Text, not str: brackets in a class name are no markup.
        table.add_row(Text(label), *(_cell(cell) for cell in cells))
    return table


def _counts_tables(sheet: dict[str, Any], key: str, title: str) -> list[RenderableType]:
    """Return a table of what sites count under ``key``, with a line before it; nothing where none does."""
    from rich.table import Table
    from rich.text import Text

    counts = [site.get(key, {}) for site in sheet["sites"].values()]
    if not any(counts):
        return []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for name in sheet["sites"]:
        table.add_column(name, justify="right")
    for label in dict.fromkeys(label for count in counts for label in count):
        table.add_row(Text(label), *("/".join(map(str, count.get(label, {}).values())) or "-" for count in counts))
    return ["", table]


def _cell(cell: dict[str, int]) -> str:
    return f"{cell['train']}/{cell['val']}/{cell['test']}" if cell["total"] else "-"


def _problems_table(problems: list[dict[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Files not used: {len(problems)}", title_justify="left", box=None, pad_edge=False)
    for title in ("site", "file", "reason"):
        table.add_column(title)
    for problem in problems[:_SHOWN]:
        table.add_row(*(Text(printable(problem[key])) for key in ("site", "name", "reason")))
    if len(problems) > _SHOWN:
        table.add_row("", f"and {len(problems) - _SHOWN} more", "")
    return table


def _range(ends: list[int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"

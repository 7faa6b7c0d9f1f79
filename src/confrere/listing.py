"""Lists of methods and backbones, derived from their registries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from confrere import methods as _methods  # noqa: F401  fills the registry
from confrere.adapters import head
from confrere.backbones import REGISTRY
from confrere.method import METHODS, Method

if TYPE_CHECKING:
    from rich.table import Table


def method_rows() -> list[dict[str, Any]]:
    """Return one row per registered method: name, title, sends, keeps, needs, paper."""
    return [describe_method(cls()) for _, cls in sorted(METHODS.items())]


def backbone_rows() -> list[dict[str, Any]]:
    """Return one row per known backbone."""
    return [
        {
            "name": e.name,
            "source": e.source,
            "licence": e.licence,
            "input": "x".join(map(str, e.input_size)) if e.input_size else None,
            "blocks": e.depth,
            "width": e.width,
            "sha256": e.sha256,
            "note": e.note,
        }
        for e in REGISTRY.values()
    ]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """Return rows as a table for a terminal."""
    from rich.table import Table

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        drawn.add_column(column, no_wrap=column in ("name", "needs"), overflow="fold")
    for row in rows:
        cells = (row[column] for column in columns)
        drawn.add_row(*(", ".join(c) if isinstance(c, list) else str(c if c is not None else "") for c in cells))
    return drawn


def describe_method(method: Method) -> dict[str, Any]:
    """Return what leaves a site and what stays, in words, for lists and reports."""
    parts = {f"{slot} adapter": f"x.lora_B.{slot}.weight" for slot in method.slots} | {"head": head.WEIGHT}
    sent = [part for part, name in parts.items() if method.sends and method.shared(name)]
    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "needs": method.needs,
        "sends": ["all images and labels"] if method.pools else sent,
        "keeps": [part for part in parts if part not in sent] + list(method.also_keeps),
    }

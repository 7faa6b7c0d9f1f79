"""Lists of methods and backbones, derived from their registries."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confrere import methods as _methods  # noqa: F401  fills the registry
from confrere.adapters import head
from confrere.backbones import REGISTRY
from confrere.errors import ConfigError
from confrere.federation.robust import RULES, check_rule
from confrere.federation.secure.settings import check_method, hides
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


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print rows as JSON, or some of their columns as a table."""
    from rich.console import Console

    if as_json:
        print(json.dumps(list(rows), indent=1))
    else:
        Console(highlight=False).print(table(rows, columns))


def describe_method(method: Method) -> dict[str, Any]:
    """Return what leaves a site and what stays, in words, for lists and reports."""
    sent: list[str] = []
    kept: list[str] = []
    parts = {slot: (f"x.lora_A.{slot}.weight", f"x.lora_B.{slot}.weight") for slot in method.slots}
    for slot, (a, b) in parts.items():
        leaves = [bool(method.sends) and method.shared(name) for name in (a, b)]
        if leaves[0] == leaves[1]:
            (sent if leaves[0] else kept).append(f"{slot} adapter")
        else:
            sent.append(f"{slot} {'A' if leaves[0] else 'B'}")
            kept.append(f"{slot} {'B' if leaves[0] else 'A'}")
    others = {"gates": ("x.lora_gate.weight", method.gated), "norms": ("x.norm1.weight", method.norms)}
    for part, (name, there) in {**others, "head": (head.WEIGHT, True)}.items():
        if there:
            (sent if method.sends and method.shared(name) else kept).append(part)
    if method.closed_form:  # what is solved for comes from the server; a site trains nothing that could be sent or kept
        sent, kept = [], []
    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "needs": method.needs,
        "unequal_ranks": method.unequal,
        "sends": ["all images and labels"] if method.pools else [*sent, *method.also_sends],
        "keeps": [*(kept if method.keeps is None else method.keeps), *method.also_keeps],
    }


def method_page() -> str:
    """Return docs/methods/index.md: the table of all methods, in three groups."""
    groups: dict[str, list[str]] = {"One model for all sites": [], "A model of each site's own": [], "Controls": []}
    for row in method_rows():
        control = row["name"] in ("local", "pooled")
        group = "Controls" if control else "A model of each site's own" if row["keeps"] else "One model for all sites"
        sends, keeps = (", ".join(row[key]) or "nothing" for key in ("sends", "keeps"))
        cells = (f"[{row['name']}]({row['name']}.md)", row["title"], sends, keeps, row["needs"])
        groups[group].append(
            "| " + " | ".join((*cells, "yes" if row["unequal_ranks"] else "", row["paper"] or "-")) + " |"
        )
    columns = ("name", "", "sends", "keeps", "server needs", "unequal ranks", "paper")
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    parts = [f"## {title}\n\n{head}\n" + "\n".join(lines) for title, lines in groups.items()]
    count = sum(len(lines) for lines in groups.values())
    intro = (
        f"# Methods\n\nThe registry's {count} methods; made by `python -m confrere.listing docs/methods/index.md`.\n"
        "A server that needs only a *sum* works with secure aggregation; others see *each* site's update.\n\n"
    )
    return intro + "\n\n".join([*parts, _combinations()]) + "\n"


def _combinations() -> str:
    """Return what works with what: asked of the very checks that an experiment passes, for each method's defaults."""
    columns = ("name", "[secure aggregation](../secure.md)", "[robust rules](../robust.md)", "unequal ranks", "depths")
    lines = [f"## What works with what\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"]
    for name, cls in sorted(METHODS.items()):
        method = cls()
        masked = not refuses(partial(check_method, method, unequal=False))
        rules = [r for r in RULES if r != "mean" and not refuses(partial(check_rule, method, r, 0, 100, unequal=False))]
        cells = (
            ("yes" if masked else "") if hides(method) else "nothing to mask",
            ("all" if len(rules) == len(RULES) - 1 else ", ".join(rules)) if hides(method) else "nothing to guard",
            "yes" if method.unequal else "",
            "yes" if method.depths else "",
        )
        lines.append(f"| [{name}]({name}.md) | {' | '.join(cells)} |")
    return "\n".join(lines)


def refuses(check: Callable[[], None]) -> bool:
    """Return whether a check of an experiment refuses."""
    try:
        check()
    except ConfigError:
        return True
    return False


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(method_page())

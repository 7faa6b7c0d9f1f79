"""``confrere audit``: thin, and without heavy imports until it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def audit(
    run: Annotated[Path, typer.Argument(help="directory of a finished run", show_default=False)],
    only: Annotated[list[str] | None, typer.Option(help="name of an audit; may be repeated. Default: all")] = None,
    data: Annotated[Path | None, typer.Option(help="where the run's images lie now")] = None,
    references: Annotated[int, typer.Option(help="reference models to train, even, 4 or more")] = 4,
    patients: Annotated[int, typer.Option(help="most members, and most others, of each site")] = 1000,
    attribute: Annotated[str, typer.Option(help="column (or site) that `attribute` asks. Default: all")] = "",
    seed: Annotated[int, typer.Option(help="of every draw")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Attack a finished run as its server, or whoever gets its models, could, and say what they would learn.

    Ends with exit code 11 if an attack is stronger than the run's differential privacy allows.
    """
    from rich.console import Console

    from confrere.audits.audit import Choice
    from confrere.audits.job import audit as attack
    from confrere.audits.job import hold
    from confrere.errors import MissingExtraError
    from confrere.report import write_report

    console = Console(highlight=False)

    def show(found: dict[str, Any]) -> None:
        if not as_json:
            _show(console, found)

    notify = Console(stderr=True, highlight=False, quiet=as_json)
    choice = Choice(
        seed=seed,
        references=references,
        patients=patients,
        attribute=attribute.strip().lower(),
        notify=lambda line: notify.print(line, markup=False),
    )
    found = attack(run, only=only or (), data=data, choice=choice, done=show)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    try:
        page = write_report(run)
    except MissingExtraError as error:
        typer.echo(error.reason, err=True)
    else:
        typer.echo(f"Report: {page}", err=as_json)
    hold(found, run)


def _show(console: Any, found: dict[str, Any]) -> None:
    from rich.text import Text

    console.print(Text(f"\n{found['title']}: {found['question']}", "bold"))
    console.print(_table([row for row in found["rows"] if row["main"]]))
    for said in (found["means"], f"Control: {found['control']}", *(f"Warning: {w}" for w in found["warnings"])):
        console.print(Text(said), soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "at", "measure", "strength (95 %)", "control (95 %)", "guarantee allows", "finding"):
        drawn.add_column(column, overflow="fold")
    for row in rows:
        bound = "" if row["bound"] is None else f"{row['bound']:.3f}"
        cells = (row["model"], row["subject"], row["measure"], _interval(row["strength"]), _interval(row["control"]))
        drawn.add_row(*map(Text, (*cells, bound, row["finding"])))
    return drawn


def _interval(cell: dict[str, float | None]) -> str:
    if cell["value"] is None:
        return "-"
    ends = "" if cell["low"] is None or cell["high"] is None else f" ({cell['low']:.3f} to {cell['high']:.3f})"
    return f"{cell['value']:.3f}{ends}"


def add_to(app: typer.Typer) -> None:
    """Give ``app`` this command."""
    app.command()(audit)

"""``confrere anonymise``: thin, and without heavy imports until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def anonymise(
    plan: Annotated[Path, typer.Argument(help="TOML file: which columns are what, k and m", show_default=False)],
    tables: Annotated[list[Path], typer.Argument(help="a CSV a site; its name is the site's", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder to write; with --map-with a CSV", show_default=False)],
    strangers: Annotated[
        Path | None, typer.Option(help="CSV of people in no table: tries to tell who is in one")
    ] = None,
    map_with: Annotated[
        list[Path] | None, typer.Option(help="mapping.json: write the table's new records as its classes show them")
    ] = None,
) -> None:
    """Generalise tables until every record shares what an attacker may know; say what was checked and what not."""
    from confrere.anonymise.release import write_mapped, write_release
    from confrere.errors import ConfigError

    if map_with:
        if len(tables) > 1 or strangers is not None:
            fix = "give one table, and no --strangers"
            raise ConfigError("--map-with maps the records of one table", where="--map-with", fix=fix)
        count = write_mapped(plan, tables[0], map_with, out)
        typer.echo(f"Mapped {count:,} records: {out}")
        return
    statement = write_release(plan, tables, out, strangers=strangers)
    for site, one in statement["sites"].items():
        lost = one["losses"]
        items = f", of items {lost['items']:.0%}" if "items" in lost else ""
        typer.echo(
            f"{site}: {one['rows']:,} rows in {one['classes']:,} classes, the smallest of {one['smallest_class']:,} "
            f"{statement['plan']['unit']}; loss of identifiers {lost['identifiers']:.0%}{items}"
        )
    typer.echo(f"What was checked, and what was not: {out / 'statement.md'}")


def add_to(app: typer.Typer) -> None:
    """Give ``app`` this command."""
    app.command()(anonymise)

"""``confrere onboard`` and ``confrere ranks``: thin, and without heavy imports until they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def onboard(
    run: Annotated[Path, typer.Argument(help="directory of a finished run")],
    data: Annotated[Path, typer.Argument(help="data that hold the new site", show_default=False)],
    site: Annotated[str, typer.Option(help="its name, where the data hold several")] = "",
    images: Annotated[int, typer.Option(help="labelled images to use; all others test", min=2)] = 20,
    steps: Annotated[int, typer.Option(help="optimiser steps of every model that trains", min=2)] = 50,
    seed: Annotated[int, typer.Option(help="of the draw and of training", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="default: RUN/onboard/SITE")] = None,
) -> None:
    """Find which of a run's models, or which mixture, serves a hospital that arrives later with few images."""
    from confrere.onboard import onboard as find
    from confrere.onboard import table

    found = find(run, data, site=site, images=images, steps=steps, seed=seed, out=out)
    typer.echo(table(found))
    typer.echo(f"Saved: {out or run / 'onboard' / found['site']}")


def ranks(
    data: Annotated[Path, typer.Argument(help="folder, CSV or federation.toml", show_default=False)],
    memory_mb: Annotated[list[str], typer.Option(help="of adapter and optimiser: a number for all, or site=number")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value", show_default=False)] = None,
) -> None:
    """Suggest a rank for every site from its training images and its memory, as a line for the experiment."""
    from confrere.ranks import suggest

    for line in suggest(data, memory_mb, overrides or []):
        typer.echo(line)


def add_to(app: typer.Typer) -> None:
    """Give ``app`` these commands."""
    app.command()(onboard)
    app.command()(ranks)

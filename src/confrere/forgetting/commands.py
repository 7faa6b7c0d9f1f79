"""``confrere forget``: thin, and without heavy imports until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def forget(
    run: Annotated[Path, typer.Argument(help="directory of a finished run", show_default=False)],
    out: Annotated[Path, typer.Option(help="new directory for what is left")],
    site: Annotated[str | None, typer.Option(help="site to forget")] = None,
    patients: Annotated[Path | None, typer.Option(help="CSV with a column patient (or lesion)")] = None,
    by: Annotated[str, typer.Option(help="way, with options: neggrad:beta=0.99")] = "rebuild",
    judge: Annotated[int, typer.Option(help="models to train again, with other seeds, to compare with", min=0)] = 0,
    models: Annotated[Path | None, typer.Option(help="where those are kept for other judgements")] = None,
    quiet: Annotated[bool, typer.Option(help="print nothing but errors")] = False,
) -> None:
    """Make a run without a site or patients that took part in it; the old run stays, and is yours to delete."""
    from confrere.forgetting.forget import forget as carry_out
    from confrere.forgetting.who import whom
    from confrere.progress import progress

    who = whom(site, patients)
    with progress(quiet=quiet) as notify:
        found = carry_out(run, who, out, by=by, retrain=judge, models=models, notify=notify)
    if not quiet:
        typer.echo((out / "forgetting.md").read_text(encoding="utf-8"))
        typer.echo(f"Certificate: {out / 'certificate.json'}" + ("" if found["exact"] else " (approximate)"))
        typer.echo(f"Its report: confrere report {out}")


def add_to(app: typer.Typer) -> None:
    """Give ``app`` this command."""
    app.command()(forget)

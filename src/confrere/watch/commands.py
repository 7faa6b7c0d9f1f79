"""``confrere status`` and ``confrere watch``: thin, and without heavy imports until they run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from confrere.watch.state import SiteState, State

StalledAfter = Annotated[float, typer.Option(help="seconds without a sign of life", min=1)]
Run = Annotated[Path, typer.Argument(help="directory of a run", show_default=False)]


def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    stalled_after: StalledAfter = 900,
) -> None:
    """Say what a run is doing, by site; the exit status is 0 unless it failed, stopped or stalled."""
    from rich.console import Console
    from rich.text import Text

    from confrere.errors import RunError
    from confrere.watch.reader import Watcher

    state, now = Watcher(run).state(), time.time()
    if as_json:
        typer.echo(json.dumps(state.as_json(now, stalled_after), indent=1))
    else:
        console = Console(highlight=False)
        console.print(_table(state, now))
        console.print(Text(state.verdict(now, stalled_after)), soft_wrap=True)
    if state.phase == "failed":
        what = f"the run failed: {state.error or 'no reason is known'}"
        raise RunError(what, where=str(run), fix="mend it; the same command continues the run", code="run-failed")
    if state.again:
        what, fix = "the run stopped before it was done", f"continue with: {state.again}"
        raise RunError(what, where=str(run), fix=fix, code="run-stalled")
    if state.stalled(now, stalled_after):
        what = f"the run stalled in phase {state.phase}"
        fix = "is its process there, and are its sites? the command that began it continues it"
        raise RunError(what, where=str(run), fix=fix, code="run-stalled")


def watch(
    run: Run,
    host: Annotated[str, typer.Option(help="address to listen on; others than this machine's own need TLS")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any that is free", min=0, max=65535)] = 9464,
    cert: Annotated[Path | None, typer.Option(help="PEM file of a certificate chain")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of its private key")] = None,
    name: Annotated[list[str] | None, typer.Option(help="host name under which readers ask, besides --host")] = None,
    stalled_after: StalledAfter = 900,
) -> None:
    """Serve a live page and Prometheus metrics of a run, read-only, for those who have the token."""
    from confrere.errors import MissingExtraError

    try:
        from confrere.watch.serve import VARIABLE, start
    except ImportError as error:
        raise MissingExtraError(error.name or "starlette", "flower", needed_for="the live page") from error

    served = start(run, host, port, cert=cert, key=key, names=name or (), stalled_after=stalled_after)
    shown = f"{served.url}/ (token: that of {VARIABLE})" if os.environ.get(VARIABLE) else served.address
    typer.echo(f"Watching {run}: {shown}")
    typer.echo("Metrics: /metrics, health: /healthz. Ctrl-C ends it; the run goes on.")
    try:
        served.wait()
    except KeyboardInterrupt:
        served.stop()


def _table(state: State, now: float) -> Table:
    from rich.table import Table
    from rich.text import Text

    from confrere.report.render import decimal, percent, size

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    drawn.add_column("site", overflow="fold")
    for column in ("state", "score %", "loss", "sent", "received", "refusals"):
        drawn.add_column(column, justify="left" if column in ("state", "refusals") else "right")
    for site in state.sites:
        refusals = ", ".join(f"{code} ({count})" for code, count in site.refusals.items())
        numbers = (percent(site.score), decimal(site.loss, 3), size(site.sent_bytes), size(site.received_bytes))
        drawn.add_row(*map(Text, (site.name, _standing(site, now), *numbers, refusals)))
    return drawn


def _standing(site: SiteState, now: float) -> str:
    from confrere.report.render import duration

    if site.refused:
        return f"refused: {site.refused}"
    if site.expected:
        return "expected"
    if site.online is False:
        return "offline" + (f", seen {duration(now - site.seen)} ago" if site.seen else ", never seen")
    return "waited for" if site.waiting else "online" if site.online else "idle"


def add_to(app: typer.Typer) -> None:
    """Give ``app`` these commands."""
    app.command()(status)
    app.command()(watch)

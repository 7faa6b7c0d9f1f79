"""``confrere coordinator`` and ``confrere site``: thin, and without heavy imports until they run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

Log = Annotated[Path | None, typer.Option(help="file of the structured log: one JSON object a line, rotated")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value", show_default=False)]


def coordinator(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="folder `coordinator` of `confrere provision`")],
    out: Annotated[Path, typer.Option(help="the run's directory; one that is there goes on where it was")],
    config: Annotated[Path | None, typer.Option(help="TOML file of the experiment, as `confrere run` takes it")] = None,
    host: Annotated[str, typer.Option(help="address of this machine on which sites are served")] = "0.0.0.0",
    deadline: Annotated[float, typer.Option(help="seconds in which a site must answer", min=1)] = 3600.0,
    patience: Annotated[float, typer.Option(help="seconds to wait for a site that is not online", min=0)] = 600.0,
    late: Annotated[list[str] | None, typer.Option(help="a site that may come after round 1 has begun; repeat")] = None,
    watch: Annotated[int, typer.Option(help="port of the live page on this machine; 0: none")] = 0,
    log: Log = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print only errors")] = False,
    overrides: Overrides = None,
) -> None:
    """Run an experiment across hospitals, or go on with one that was stopped."""
    _check_extra()
    from confrere.consortium.kit import load
    from confrere.flower.lead import lead
    from confrere.progress import progress

    how: dict[str, Any] = {"host": host, "deadline": deadline, "patience": patience, "watch": watch, "log": log}
    how["late"] = late or ()
    known = load(kit, "coordinator")
    try:
        with progress(quiet=quiet) as show:
            told = _teller(None, quiet=quiet)
            headline = lead(known, out, config, overrides or [], notify=told, show=show, **how)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; continue with: confrere coordinator {kit} --out {out}", err=True)
        raise typer.Exit(130) from None
    if headline and not quiet:
        typer.echo(headline)


def site(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="the folder this site was given")],
    data: Annotated[Path, typer.Option(help="its images: a folder, CSV or federation.toml; they stay here")],
    state: Annotated[Path, typer.Option(help="folder for personal adapters and journals; back it up")],
    policy: Annotated[Path | None, typer.Option(help="default: policy.toml in the kit")] = None,
    retry: Annotated[float, typer.Option(help="seconds to go on trying to reach the coordinator", min=0)] = 86400.0,
    log: Log = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print only errors")] = False,
    overrides: Overrides = None,
) -> None:
    """Take part as a hospital: serve the coordinator's requests until stopped (Ctrl-C)."""
    _check_extra()
    from confrere.arguments import check_places
    from confrere.consortium.kit import load
    from confrere.consortium.policy import load as load_policy
    from confrere.consortium.worker import Worker
    from confrere.flower.site import run_site
    from confrere.record.run import Run

    check_places(data, state)
    known = load(kit, "site")
    rules = load_policy(policy or kit / "policy.toml")
    notify = _teller(log, quiet=quiet)
    with Run(state).lock():
        worker = Worker(kit=known, policy=rules, data=data, state=state, overrides=overrides or [], notify=notify)
        with contextlib.suppress(KeyboardInterrupt):  # the usual end of a service
            run_site(known, worker, retry=retry, notify=notify)


def _teller(log: Path | None, *, quiet: bool) -> Any:
    """Return what tells the local user of events in words, and the structured log in its own."""
    from confrere.errors import printable
    from confrere.watch.log import Log as Structured

    written = Structured(log) if log else None

    def tell(event: dict[str, Any]) -> None:
        if written:
            written(event)
        parts = [str(event[key]) for key in ("kind", "site", "code", "reason", "fix", "address") if event.get(key)]
        training = f"{'control' if event.get('control') else 'method'} {event['method']}" if event.get("method") else ""
        number = f"round {event['round']}" if event.get("round") else ""
        if not quiet and event["event"] != "prefix":
            typer.echo(printable("  ".join(filter(None, [f"{event['event']:<12}", *parts, training, number]))))

    return tell


def _check_extra() -> None:
    from confrere.consortium.commands import check_extra

    check_extra("flwr")


def add_to(app: typer.Typer) -> None:
    """Give ``app`` these commands."""
    app.command()(coordinator)
    app.command()(site)

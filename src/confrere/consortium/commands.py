"""Commands of a consortium: thin, and without heavy imports until they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def provision(
    roster: Annotated[Path, typer.Argument(metavar="CONSORTIUM.toml", help="who takes part", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder of all kits: new, or that of an earlier run")],
    renew: Annotated[bool, typer.Option(help="new server certificate and dates; hand over all kits again")] = False,
    revoke: Annotated[list[str] | None, typer.Option(help="a site whose keys are deleted")] = None,
) -> None:
    """Make the kit of every site and of the coordinator: keys, certificates and the signed list of who takes part."""
    check_extra("cryptography")
    from confrere.consortium.authority import colons
    from confrere.consortium.provision import provision as make

    made = make(roster, out, renew=renew, revoke=revoke or ())
    typer.echo(f"Authority (SHA-256), the same for all; compare it by telephone:\n  {colons(made.ca)}")
    width = max(map(len, made.sites))
    for name, (change, fingerprint) in sorted(made.sites.items()):
        typer.echo(f"{name:<{width}}  {change:<8}{fingerprint}")
    typer.echo(f"Valid until {made.expires:%Y-%m-%d}. Hand over {out}/coordinator and each folder of {out}/sites.")
    typer.echo(f"Keep {out}/ca.key off the network: whoever has it can make kits.")


def check_extra(package: str) -> None:
    """Raise MissingExtraError where a package of the extra ``flower`` is not installed."""
    from importlib.util import find_spec

    from confrere.errors import MissingExtraError

    if find_spec(package) is None:
        raise MissingExtraError(package, "flower", needed_for="a consortium of hospitals")


def add_to(app: typer.Typer) -> None:
    """Give ``app`` these commands."""
    app.command()(provision)

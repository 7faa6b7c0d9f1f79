"""``confrere pretrain``, ``onboard``, ``ranks``, ``verify``, ``doctor``, ``epsilon``: imports wait until one runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from confrere.console import say, start


def pretrain(
    path: Annotated[Path, typer.Argument(help="folder of sites, CSV or federation.toml; labels are not read")],
    out: Annotated[Path, typer.Option(help="run directory, new or empty")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value", show_default=False)] = None,
    task: Annotated[
        str | None, typer.Option(help="reconstruction (MAE, the default), contrast (MoCo v3); lwi of volumes")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="vit-nano, vit-tiny (the default), vit-small, vit-base; of volumes unetr, unet, swinunetr"),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="fedit (FedAvg, the default), fedavgm, fedadagrad, fedadam, fedyogi, fedprox")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="federated rounds; default 100", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="of training; default 0", min=0)] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of an experiment")] = None,
    quiet: Annotated[bool, typer.Option(help="print nothing but errors")] = False,
) -> None:
    """Train a network of the sites' own on images or volumes without labels; what comes out is a backbone for `run`."""
    from confrere.arguments import named
    from confrere.pretrain import GENERAL, pretraining

    path, values = named(path, config)
    values |= {key: value for key, value in (("rounds", rounds), ("seed", seed)) if value is not None}
    for table, name in (("task", task), ("backbone", backbone), ("method", method)):
        if name is not None and name != values.get(table, {}).get("name"):
            values[table] = {"name": name}
    start(path, out, pretraining(values), overrides or [], quiet=quiet)
    if not quiet:
        say("Backbone, for backbone.name: ", out / GENERAL)


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


def verify(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    public_key: Annotated[Path | None, typer.Option(help="PEM file of the key that must have signed it")] = None,
) -> None:
    """Check every line of a run's journal and compute every round's shared adapter again from what was sent."""
    from confrere.verify import verify as check

    for part in check(run, public_key):
        typer.echo(part.sentence())


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH|EXPERIMENT.toml|RUN] [KEY.PATH=VALUE]...", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where the run shall be written")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of an experiment")] = None,
    site: Annotated[Path | None, typer.Option(help="kit of a site: check that it can take part")] = None,
    data: Annotated[Path | None, typer.Option(help="with --site: its images or table")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Find what would break a run before it begins, or a stopped one before it goes on; without PATH: the machine."""
    from confrere.doctor import Finding, examine, sort_out, summary, verdict

    path, overrides = sort_out(arguments or [], kit=site is not None)
    if site is not None:
        from confrere.consortium.commands import check_extra

        check_extra("cryptography")
        from confrere.consortium.doctor import examine_site

        findings = examine_site(site, data=data, config=config, overrides=overrides, out=out)
    else:
        findings = examine(path, overrides, out=out, config=config)
    found: list[Finding] = []
    for finding in findings:
        found.append(finding)
        if not as_json:
            typer.echo(finding.line())
    code = verdict(found)
    if as_json:
        typer.echo(json.dumps({"exit_code": code, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        typer.echo(summary(found))
    raise typer.Exit(code)


def epsilon(
    sigma: Annotated[float, typer.Option(help="noise, in units of the clip", min=0)],
    rounds: Annotated[int, typer.Option(help="releases; one that is done again counts again", min=1)],
    delta: Annotated[float, typer.Option(help="at most 0.1 over the number of units")],
    parameters: Annotated[int, typer.Option(help="numbers that a hospital sends a round", min=0)],
    sites: Annotated[int, typer.Option(help="hospitals, for --unit site", min=0)] = 0,
    unit: Annotated[str, typer.Option(help="what is hidden: site, record or patient")] = "site",
    records: Annotated[int, typer.Option(help="training images, or patients, of one hospital", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="of which so many are expected in a step", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="noisy local steps a round", min=1)] = 10,
    fraction: Annotated[float, typer.Option(help="chance of a hospital to be drawn in a round")] = 1.0,
    target: Annotated[float, typer.Option(help="epsilon whose sigma is wanted too; 0: none", min=0)] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what hiding hospitals, or their images or patients, costs: epsilon, and how loud the noise is."""
    from confrere.privacy.planning import lines, plan, plan_units, unit_lines

    if unit != "site":
        of_site: dict[str, Any] = {
            "records": records,
            "batch": batch,
            "steps": rounds * steps,
            "parameters": parameters,
        }
        said = plan_units(unit=unit, sigma=sigma, delta=delta, target=target, **of_site)
        typer.echo(json.dumps(said, indent=1, allow_nan=False) if as_json else "\n".join(unit_lines(said)))
        return
    options = {"sigma": sigma, "fraction": fraction, "delta": delta, "target": target}
    found = plan(**options, rounds=rounds, sites=sites, parameters=parameters)
    typer.echo(json.dumps(found, indent=1, allow_nan=False) if as_json else "\n".join(lines(found)))


def add_to(app: typer.Typer) -> None:
    """Give ``app`` these commands."""
    app.command()(pretrain)
    app.command()(onboard)
    app.command()(ranks)
    app.command()(verify)
    app.command()(doctor)
    app.command()(epsilon)

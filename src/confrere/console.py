"""What the verbs that train have in common: they begin or continue a run, show it, and write its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from confrere.config import Experiment


def start(path: Path, out: Path, values: dict[str, Any], overrides: Sequence[str], *, quiet: bool = False) -> None:
    """Run the experiment on the data at ``path`` in the new directory ``out``.

    Raises:
        ConfrereError: see :func:`confrere.job.run_experiment`.
        SystemExit: 130, when it was interrupted.
    """
    from confrere.arguments import check_places, experiment_of
    from confrere.record.run import Run

    check_places(path, out)
    experiment = experiment_of(path, values, overrides)
    Run(out).make_new()
    carry_out(experiment, out, quiet=quiet)


def carry_out(experiment: Experiment, out: Path, *, quiet: bool, accept_drift: bool = False) -> None:
    """Run an experiment, or what is left of it, and write its report; raises as :func:`start`."""
    from confrere.job import run_experiment
    from confrere.progress import progress
    from confrere.track import trackers

    with progress(quiet=quiet) as notify, trackers(experiment.track, out) as track:

        def both(event: dict[str, Any]) -> None:
            notify(event)
            track(event)

        try:
            found = run_experiment(experiment, out, notify=both, accept_drift=accept_drift)
        except KeyboardInterrupt:
            typer.echo(f"interrupted; continue with: confrere resume {out}", err=True)
            raise SystemExit(130) from None
    if not quiet and found:
        for by in found["sites"].values():
            for entry in by.values():
                say(f"  {entry['sentence']}")
        say("", found["headline"])
    if not quiet:
        report_on(out)


def report_on(out: Path) -> None:
    """Write the report of a run or comparison, and say where it is."""
    from confrere.report import write_report

    say("Report: ", write_report(out))


def console() -> Console:
    """Return where tables are printed."""
    from rich.console import Console

    return Console(highlight=False)


def say(text: str, bold: object = "") -> None:
    """Print a line, its end in bold."""
    from rich.text import Text  # as it is: a path may hold what rich takes for markup

    console().print(Text.assemble(text, (str(bold), "bold")), soft_wrap=True)

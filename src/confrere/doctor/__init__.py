"""``confrere doctor``: what would break a run, found before round 1.

It asks the functions that a run asks, in their order, and reports every answer instead of ending at the first bad one.
It trains nothing, fetches nothing and leaves the run directory and the data as they are. Decoded images stay in the
cache, where the run finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from confrere.arguments import check_places, experiment_of, named
from confrere.config import Experiment
from confrere.doctor.data import data_findings, opened
from confrere.doctor.finding import Finding, attempt, summary, verdict
from confrere.doctor.machine import machine_findings
from confrere.doctor.model import model_findings
from confrere.doctor.places import cache_findings, other_cache, out_findings
from confrere.doctor.resume import resume_findings
from confrere.errors import ConfigError
from confrere.fingerprint import stored_experiment

__all__ = ["Finding", "examine", "sort_out", "summary", "verdict"]


def sort_out(arguments: Sequence[str], *, kit: bool = False) -> tuple[Path | None, list[str]]:
    """Return PATH, if one is given, and overrides: what exists is a path, else what holds an equals sign is none.

    ``kit``: data come with ``--data`` instead of PATH.
    """
    paths = [one for one in arguments if Path(one).exists() or "=" not in one]
    overrides = [one for one in arguments if one not in paths]
    if kit and paths:
        raise ConfigError("PATH does not go with --site", where=paths[0], fix="confrere doctor --site KIT --data PATH")
    if len(paths) > 1 or (overrides and not paths and not kit):
        what = "more than one path is given" if paths else "overrides need data"
        raise ConfigError(what, fix="confrere doctor [PATH] [key.path=value ...]")
    return Path(paths[0]) if paths else None, overrides


def examine(
    path: Path | None, overrides: Sequence[str] = (), *, out: Path | None = None, config: Path | None = None
) -> Iterator[Finding]:
    """Yield what was found, check by check.

    Args:
        path: data, an experiment's TOML file, or the directory of a run that shall go on; None looks at the machine.
        overrides: ``key.path=value`` of the experiment; not for a run, which keeps its own.
        out: where the run shall be written.
        config: a TOML file of an experiment.
    """
    if path is None:
        yield from machine_findings(None)
        yield from cache_findings()[0]
        return
    run = path if (path / "experiment.toml").is_file() else None
    found: list[Finding] = []
    experiment = _experiment(path, overrides, out, config, found) if run is None else _kept(run, found)
    yield from found
    out = run or out
    yield from out_findings(out, new=run is None) if out else ()
    yield from machine_findings(experiment)
    found, usable = cache_findings()
    yield from found
    if experiment is None:
        return
    with other_cache(usable):
        found = []
        federation = opened(experiment, run, found)
        yield from found
        if federation is not None:
            yield from data_findings(experiment, federation)
            yield from model_findings(experiment, federation, out)
    if run is not None:
        yield from resume_findings(run, experiment, federation)


def _experiment(
    path: Path, overrides: Sequence[str], out: Path | None, config: Path | None, found: list[Finding]
) -> Experiment | None:
    """Return what a run would be made of, None where the command line or a file is wrong."""
    told = attempt("experiment", lambda: named(path, config), found)
    if told is None:
        return None
    data, values = told
    attempt("places", lambda: check_places(data, out), found)
    experiment = attempt("experiment", lambda: experiment_of(data, values, overrides), found)
    if experiment is not None:
        what = f"{experiment.method['name']}, {experiment.rounds} rounds, controls: {', '.join(experiment.controls)}"
        found.append(Finding("ok", "experiment", what))
    return experiment if data.exists() else None


def _kept(run: Path, found: list[Finding]) -> Experiment | None:
    """Return the experiment of a run, None where it cannot be read."""
    experiment = attempt("experiment", lambda: stored_experiment(run), found)
    if experiment is not None:
        found.append(Finding("ok", "experiment", f"{experiment.method['name']}, as the run began", str(run)))
    return experiment

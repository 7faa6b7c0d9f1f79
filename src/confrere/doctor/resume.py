"""A run that was stopped: its journal, its states, and what would make ``confrere resume`` refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from confrere.config import Experiment
from confrere.data.federation import Federation
from confrere.doctor.finding import Finding, attempt
from confrere.errors import RunError
from confrere.fingerprint import differences, trainings
from confrere.job import threads
from confrere.record.files import read_json
from confrere.record.journal import last_round
from confrere.record.machine import threads_kept
from confrere.record.run import Run


def resume_findings(out: Path, experiment: Experiment, federation: Federation | None) -> Iterator[Finding]:
    """Yield what stands about the run in ``out`` and its controls; without data, whether they changed stays open."""
    yield from _in_use(out)
    if federation is not None:
        yield from _changed(out, experiment, federation)
    for part in trainings(out, experiment):
        yield from _part(part, str(part.relative_to(out)), experiment)


def _in_use(out: Path) -> Iterator[Finding]:
    if not (out / ".lock").exists():
        return
    try:
        with FileLock(out / ".lock", timeout=0):
            return
    except Timeout:
        yield Finding("error", "lock", "a process is using this run", str(out), "wait for it, or stop it", 5)
    except OSError as error:
        yield Finding("error", "lock", f"it cannot be locked: {error.strerror}", str(out), "mend the permissions", 5)


def _changed(out: Path, experiment: Experiment, federation: Federation) -> Iterator[Finding]:
    """Yield what :func:`confrere.fingerprint.begin` would refuse."""
    found: list[Finding] = []
    with threads_kept():
        torch.set_num_threads(threads(experiment, federation))
        changed = attempt("resume", lambda: differences(out, experiment), found)
    kept = attempt("resume", lambda: dict(read_json(out / "federation.json")).get("digest", ""), found)
    yield from found
    for one in changed or ():
        fix = "restore it, or resume with --accept-drift and give up bit-identity"
        yield Finding("error", "resume", f"changed since the run began: {one}", str(out), fix, RunError.exit_code)
    if kept is not None and kept != federation.digest:
        what = "the data changed since this run began"
        yield Finding("error", "resume", what, str(out), "restore them, or start a new run", RunError.exit_code)
    if not found and not changed and kept == federation.digest:
        yield Finding("ok", "resume", "experiment, data, packages and threads are those the run began with")


def _part(part: Path, name: str, experiment: Experiment) -> Iterator[Finding]:
    found: list[Finding] = []
    run, where = Run(part), str(part)
    events = attempt("journal", run.events, found)
    yield from found
    if events is None:
        return
    last = last_round(events)
    done = "finished" if (part / "results.json").exists() else f"round {last} of {experiment.rounds} is the last one"
    yield Finding("ok", "journal", f"{name}: {len(events)} records, {done}", where)
    if not run.server_file(last).exists():
        if last:
            found.append(Finding("warning", "states", f"the server's state after round {last} is missing", where))
    else:
        took_part = {site for e in events if e["event"] == "round" for site in e["sites"]}
        attempt("states", lambda: run.server(last), found)
        for site in sorted(took_part):
            attempt("states", partial(run.store(site).before, last + 1), found)
    for fault in found:
        what = f"{fault.what}: resume goes back to an earlier round"
        yield Finding("warning", "states", what, fault.where, "restore it from a copy, or let resume do it again")
    if not found and events:
        yield Finding("ok", "states", f"{name}: those of round {last} can be read", where)

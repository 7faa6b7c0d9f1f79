"""``confrere forget``: a new run without a site or patients, what it cost, how near it is, and a certificate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from confrere.arguments import check_places
from confrere.errors import ConfigError
from confrere.examination import examine_sites
from confrere.export import export_adapters
from confrere.federation.transport import InProcess
from confrere.forgetting import dampening, distillation, eraser, negative, scrub  # noqa: F401  fill the registry
from confrere.forgetting.certificate import certify, left_behind, not_shown, report
from confrere.forgetting.data import Opened, finished, open_both
from confrere.forgetting.downdate import downdate
from confrere.forgetting.frame import Frame, plain, refuse
from confrere.forgetting.judging import framed, judged_by, prepared
from confrere.forgetting.rebuild import rebuild
from confrere.forgetting.way import EXACT, WAYS, Cost, parse
from confrere.forgetting.who import Whom
from confrere.job import Notify, make_site
from confrere.method import Reply
from confrere.record.files import file_digest, read_json, write_bytes, write_json
from confrere.record.machine import threads_kept
from confrere.record.run import Run
from confrere.record.store import MemoryStore
from confrere.tensors import Tensors, digest

REBUILT = "It equals, byte for byte, what a run that never had the forgotten would hold, on the same machine."
NOISY = (
    "Trained again without the forgotten, with noise drawn anew: a run that never had them has the same distribution."
)
SOLVED = "It equals the head of a run that never had the forgotten, to rounding; nothing else was trained."
APPROXIMATE = "Approximate: how near it is to never having had the forgotten is measured, not proven."


@threads_kept()
def forget(
    run: Path,
    who: Whom,
    out: Path,
    *,
    by: str = "rebuild",
    retrain: int = 0,
    models: Path | None = None,
    notify: Notify = lambda event: None,
) -> dict[str, Any]:
    """Return (and write as ``forgetting.json``) what was done to make ``run`` forget; the old run stays as it is.

    Args:
        run: a finished run in one process.
        who: whom to forget.
        out: new directory: adapters, report, certificate. The same call continues a rebuild that was stopped.
        by: a name of ``EXACT`` or ``WAYS``, with options: ``neggrad:beta=0.99``.
        retrain: models to train again without the forgotten, with other seeds, to judge the result by; 0: none.
        notify: called with every event.
        models: where those are kept (``OUT/judge``); what an earlier call trained there is used again.

    Raises:
        ConfigError, DataError, RunError: what cannot be forgotten so; the message names what can be done.
    """
    name, options = parse(by)
    if retrain == 1:
        fix = "use --judge 5 or more, or 0"
        raise ConfigError("one retrained model has no spread", where="--judge", fix=fix, code="value")
    check_places(Path(finished(run, who).path), out)
    _check_place(run, out, name)
    with ExitStack() as held:
        for place in (run, out):
            held.enter_context(Run(place).lock())
        opened = open_both(run, who, out)
        _check(opened, who, name, retrain)
        cost, made, frame = _carry_out(run, who, opened, out, name, options, notify)
        judged = None
        if retrain:
            frame = frame or framed(Run(run), opened, prepared(opened, notify))
            judged = judged_by(run, out, opened, frame, models or out / "judge", retrain, notify)
        found = {
            "way": name,
            "title": EXACT.get(name) or WAYS[name].title,
            "options": options,
            "exact": name in EXACT,
            "statement": {"rebuild": NOISY if opened.noisy else REBUILT, "downdate": SOLVED}.get(name, APPROXIMATE),
            "cost": cost.told(),
            "retraining": _retraining(run, opened),
            "judgement": judged,
            "not_shown": not_shown(exact=name in EXACT, judged=bool(judged), noise=opened.noisy),
            "still_to_delete": left_behind(run),
        }
        report(out, who, found)
        certify(run, out, opened, who, found, made)
        return found


def _carry_out(
    run: Path, who: Whom, opened: Opened, out: Path, name: str, options: Mapping[str, Any], notify: Notify
) -> tuple[Cost, dict[str, str], Frame | None]:
    """Forget; return the cost, digests of what was made and, unless it was rebuilt, the frame."""
    started = time.perf_counter()
    if name == "rebuild":
        cost = rebuild(run, opened, out, notify)
        cost.seconds = time.perf_counter() - started
        return cost, _files(out), None
    frame = framed(Run(run), opened, prepared(opened, notify))
    shared = downdate(frame, who.site) if name == "downdate" else WAYS[name](frame, options)
    frame.cost.seconds = time.perf_counter() - started
    return frame.cost, _write(out, frame, shared), frame


def _check(opened: Opened, who: Whom, name: str, retrain: int) -> None:
    """Refuse ways and judgements that the method, the task or the data do not allow."""
    method, old, patients = opened.old.build_method(), opened.old, bool(who.patients)
    if name in WAYS:
        refuse(method, masked=old.masked, noisy=opened.noisy, patients=patients, target=old.data.target)
    _needs_data(opened, who, name, retrain)
    general = patients or method.has_general()
    if retrain and not (plain(method) and general and not method.pools and old.data.target == "label"):
        what = f"{method.name} has no one model of classes whose distance could be measured"
        raise ConfigError(what, where="--judge", fix="leave --judge out", code="forgetting")


def _check_place(run: Path, out: Path, name: str) -> None:
    """Refuse to write into the run, or over what another call made; a rebuild that was stopped goes on."""
    if out.resolve().is_relative_to(run.resolve()):
        what, fix = "the new run would be written into the old one", "choose a place outside of it"
        raise ConfigError(what, where="--out", fix=fix, code="forgetting")
    goes_on = name == "rebuild" and (out / "backbone.json").exists() and not (out / "certificate.json").exists()
    if not goes_on:
        Run(out).check_new()


def _needs_data(opened: Opened, who: Whom, name: str, retrain: int) -> None:
    """Refuse ways that look at the forgotten images when those are gone."""
    looks = name in WAYS and name != "federaser"
    if opened.before is None and (looks or retrain):
        what = "the images to forget are not in the data any more"
        fix = "use --by rebuild without --judge: it needs none of them"
        raise ConfigError(what, where=f"site {who.site}", fix=fix, code="forgetting")


def _write(out: Path, frame: Frame, shared: Tensors) -> dict[str, str]:
    """Write the server's state, every site's adapters and their examination; return digests of what was made."""
    run, task, server = Run(out), frame.task, {"shared": shared}
    run.commit(0, server)
    sites = {}
    for name in task.data:
        store = MemoryStore()
        if name in frame.private:
            store.write(0, {"private": frame.private[name]}, Reply(site=name, round=0))
        site = make_site(task, name, run)
        sites[name] = replace(site, store=store, keep=None)
    names = [site.name for site in task.federation.sites]
    transport = InProcess(sites)
    results = examine_sites(task.experiment, task.federation.classes, names, run, transport, 0)
    export_adapters(out / "adapters", task.method, server, sites, results, 0)
    write_json(out / "examination.json", results)
    write_json(out / "backbone.json", task.describe())
    write_bytes(out / "experiment.toml", task.experiment.toml().encode())  # what `confrere predict` reads
    return {"shared": digest(server), **_files(out)}


def _files(out: Path) -> dict[str, str]:
    found = [*sorted((out / "adapters").rglob("*")), out / "results.json", out / "examination.json"]
    return {path.relative_to(out).as_posix(): file_digest(path) for path in found if path.is_file()}


def _retraining(run: Path, opened: Opened) -> dict[str, Any]:
    """Return what the old run took, without the forgotten site, by which ways are measured."""
    events = [event for event in Run(run).events() if event["event"] == "round"]
    asked = sum(site in opened.after_names for event in events for site in event["sites"])
    seconds = read_json(run / "results.json")["seconds"]
    return {"rounds": len(events), "steps": asked * opened.experiment.train.steps, "seconds": seconds}

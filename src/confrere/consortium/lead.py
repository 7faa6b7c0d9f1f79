"""The coordinator's run: ask every site what it is, train the method and the controls over them, collect the verdicts.

It knows no network: ``Sites`` is whatever carries a header and arrays to a site and an answer back.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from confrere.config import Experiment, validate
from confrere.consortium import states
from confrere.consortium.census import Header, Sites, simulated
from confrere.consortium.frame import PROTOCOL, Arrays
from confrere.consortium.late import Door, Joined, Membership, late_of
from confrere.consortium.status import Status
from confrere.errors import ConfigError, RunError
from confrere.export import About, Model, export_model
from confrere.federation.transport import Failure
from confrere.fingerprint import begin, trainings
from confrere.job import Prepared, initial, lead, load_backbones
from confrere.method import Reply, Request
from confrere.record.files import read_json, write_json
from confrere.record.machine import most_threads
from confrere.record.run import Run
from confrere.verdicts import headline, keep_verdicts, note

Notify = Callable[[dict[str, Any]], None]
RESUME = "resume: confrere coordinator KIT --out RUN"


class Remote:
    """The transport of one training: requests of the round loop as frames of a job."""

    def __init__(self, sites: Sites, job: Mapping[str, Any], members: Callable[[], Collection[str]]) -> None:
        self._sites, self.job, self._members = sites, dict(job), members

    def sites(self) -> tuple[str, ...]:
        """Return the names of the members that can be asked now, sorted; for one that has just gone, wait first."""
        names = self._members()
        return tuple(sorted(set(names) - set(self._sites.wait(names))))

    def exchange(self, requests: Mapping[str, Request]) -> list[Reply | Failure]:
        """Send each site its request; return what came back, sorted by site."""
        if not requests:
            return []
        frames: dict[str, tuple[Header, Arrays]] = {}
        for site, request in requests.items():
            header, arrays = states.ask(request)
            frames[site] = {**self.job, **header}, arrays
        answers = self._sites.ask(next(iter(requests.values())).kind, frames)
        return [
            found if isinstance(found, Failure) else states.answered(site, *found)
            for site, found in sorted(answers.items())
        ]


@dataclass(frozen=True, kw_only=True)
class Lead:
    """A coordinator's run.

    Args:
        out: its directory. sites: carries frames. status: told what is being done. notify: called with every event.
        roster: public identity (32 bytes) of every site that takes part.
        late: names of those that may come after round 1 has begun.
    """

    out: Path
    roster: Mapping[str, bytes]
    sites: Sites
    status: Status
    notify: Notify = lambda event: None
    late: Collection[str] = ()

    def conduct(self, experiment: Experiment) -> None:
        """Run an experiment over the sites; continue what an earlier call left unfinished.

        Raises:
            RunError: a site is missing at the start, differs from the others, or ``out`` is of another experiment.
            PolicyError: a site's policy forbids the experiment.
        """
        run = Run(self.out)
        with run.lock():
            late = late_of(self.out, self.late)
            job = {"protocol": PROTOCOL, "job": _job(self.out, late), "part": "", "experiment": as_sent(experiment)}
            self.status.phase("waiting")
            how: dict[str, Any] = {"sites": self.sites, "status": self.status, "notify": self.notify}
            members = Membership(run=run, experiment=experiment, job=job, late=set(late), **how)
            federation = members.gather(list(self.roster))
            torch.set_num_threads(experiment.threads or most_threads())
            begin(self.out, experiment, federation, accept_drift=False)
            members.keep_sheets()
            self.notify({"event": "data", "sheet": federation.sheet})
            for part in trainings(self.out, experiment):
                if not (part / "results.json").exists():
                    name = "" if part == self.out else part.name
                    own = experiment.for_method(name) if name else experiment
                    self._train(own, part, {**job, "part": name}, members)
            if experiment.other_controls:
                self.status.phase("examine", method="verdicts")
                self._verdicts(job, sorted(members.described), experiment.build_task().headline)
            self.status.phase("done")

    def _train(self, experiment: Experiment, path: Path, job: Header, members: Membership) -> None:
        """Train one method, or one control, and let every site take its model home.

        Sites join the method's training only: in a control, all who have joined take part from the start.
        """
        method, run = experiment.build_method(), Run(path)
        self.status.phase("train", method=method.name, round=0, rounds=experiment.rounds)
        self.notify({"event": "method", "name": method.name, "rounds": experiment.rounds})
        backbones, federation = load_backbones(experiment, members.everybody), members.federation
        task = Prepared(experiment=experiment, method=method, federation=federation, backbones=backbones, data={})

        def check(name: str, told: Header) -> None:
            ours, theirs = task.backbone_of(name).digest, told["backbone"].get("digest")
            if theirs != ours:
                what = f"its backbone has the hash {str(theirs)[:12]}, the coordinator's {ours[:12]}"
                raise RunError(what, where=f"site {name}", fix="install the same weights", code="site-differs")

        for name, told in members.described.items():
            check(name, told)
        door = Door(members=members, check=check, round=run.last_round() + 1) if path == self.out else None

        def tell(event: dict[str, Any]) -> None:
            if event["event"] in ("round", "examine"):
                self.status.phase("train" if event["event"] == "round" else "examine", round=event["round"])
            if door:
                door.follow(event)
            self.notify(event)

        def export(results: Mapping[str, Any], chosen: int) -> None:
            take_home(task, run, self.sites, transport, results, chosen)

        transport = Remote(self.sites, job, door or members.described.keys)
        roster = self.roster if experiment.masked else None
        while True:
            task = replace(task, federation=members.federation)
            with suppress(Joined):
                lead(task, run, transport, members.weights, export, str(job["job"]), tell, roster)
                return

    def _verdicts(self, job: Header, names: Collection[str], metric: str) -> None:
        """Collect what every site found when it compared its models on its own test patients; write verdicts.json."""
        asked: dict[str, tuple[Header, Arrays]] = {name: ({**job, "kind": "verdict"}, {}) for name in names}
        found: dict[str, Any] = {}
        for name, answer in sorted(self.sites.ask("verdict", asked).items()):
            told = {} if isinstance(answer, Failure) else answer[0]
            if not isinstance(told.get("verdicts"), dict):
                raise RunError("it gave no verdict", where=f"site {name}", fix=RESUME, code="no-replies")
            found[name] = told["verdicts"]
        keep_verdicts(Run(self.out), {"sites": found, "headline": headline(found), "note": note(metric)})


def _job(out: Path, late: Collection[str]) -> str:
    """Return the name under which the sites keep their part of the run in ``out``: 16 hexadecimal digits.

    Before a run has begun it is a new one each time, as the experiment may have been mended. Beside it stands who may
    be late.
    """
    if not (out / "experiment.toml").exists() or not (out / "job.json").exists():
        write_json(out / "job.json", {"job": secrets.token_hex(8), "late": sorted(late)})
    return str(read_json(out / "job.json")["job"])


def as_sent(experiment: Experiment) -> str:
    """Return the experiment as the sites get it: without the coordinator's path and trackers."""
    return validate({**experiment.model_dump(), "path": "the site's own", "track": ()}).toml()


def across(experiment: Experiment, classes: Collection[str]) -> tuple[Experiment, list[str]]:
    """Return the experiment as it can run across hospitals, and what was changed, in sentences.

    Raises:
        ConfigError: it cannot: the method pools images, the classes are not named, or it simulates something.
    """
    said: list[str] = []
    if experiment.build_method().pools:
        fix = "use another method"
        raise ConfigError("no hospital may send its images", where="method.name", fix=fix, code="across-hospitals")
    if simulated(experiment):
        fix = "leave it out, or run in one process: confrere run"
        raise ConfigError("this is a simulation", where=simulated(experiment)[0], fix=fix, code="across-hospitals")
    agreed = experiment.data.classes or tuple(classes)
    if len(agreed) < 2:
        fix = "set data.classes in the experiment, or classes in consortium.toml, in the order all agree on"
        raise ConfigError("the classes are not agreed", where="data.classes", fix=fix, code="across-hospitals")
    kept = tuple(name for name in experiment.controls if name != "pooled")
    if kept != experiment.controls:
        said.append("Pooled training is left out: no hospital may send its images.")
    values = experiment.model_dump()
    values["data"]["classes"] = agreed
    return validate({**values, "controls": kept}), said


def take_home(
    task: Prepared, run: Run, sites: Sites, transport: Remote, results: Mapping[str, Any], chosen: int
) -> None:
    """Let every site write its own adapters, and write the general model here, where the method makes one.

    Raises:
        RunError: a site could not.
    """
    server, method = run.server(chosen), task.method
    frames: dict[str, tuple[Header, Arrays]] = {}
    for name, entry in results["sites"].items():
        model: Model = "general" if entry["held_out"] else "personalised"
        state = method.broadcast(server, name)
        header, arrays = states.ask(Request(kind="evaluate", round=chosen, state=state, model=model))
        own = {**results, "sites": {name: entry}}
        frames[name] = {**transport.job, **header, "kind": "export", "results": own}, arrays
    for name, answer in sites.ask("export", frames).items():
        if isinstance(answer, Failure):
            what = f"it could not export its adapters: {answer.reason}"
            raise RunError(what, where=f"site {name}", fix=RESUME, code="export")
    if method.has_general():
        received = method.broadcast(server, "")
        params = method.personal(received, method.init_site(initial(task, "")))
        about = About("general", "general", task.federation.classes, 1.0)
        export_model(run.path / "adapters" / "general", method, task.backbone, params, about)

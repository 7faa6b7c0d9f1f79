"""A site's long-lived process: it holds data, backbone and state, and answers what the coordinator asks.

Every job (one run directory of the coordinator) has a directory here, laid out as a run's: ``sites/<site>`` with the
personal states, ``controls/<name>`` for the controls, ``adapters/<site>`` in the end. Nothing of it is sent away.
"""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from confrere import intake
from confrere.backbones import default_size
from confrere.config import Experiment, override, validate
from confrere.consortium import states
from confrere.consortium.census import simulated
from confrere.consortium.frame import PROTOCOL, SAME, Arrays, failure
from confrere.consortium.kit import Kit
from confrere.consortium.policy import Policy, check, check_request
from confrere.consortium.spent import budgets, check_ever
from confrere.consortium.withheld import check_received, examine_once, keyed
from confrere.data.federation import Federation, load_federation
from confrere.errors import ConfigError, ConfrereError, PolicyError, TrainingError, UpdateRefusedError
from confrere.export import About, export_model
from confrere.federation.ledger import FILE, enter_unhidden
from confrere.federation.secure.keys import Identity
from confrere.federation.secure.participant import Participant
from confrere.federation.site import Site
from confrere.fingerprint import trainings
from confrere.job import Prepared, make_site, prepare, threads
from confrere.prefix import cache_dir
from confrere.record.files import write_bytes, write_json
from confrere.record.machine import machine
from confrere.record.run import Run
from confrere.verdicts import verdicts

JOB = re.compile(r"[0-9a-f]{16}")
LOCAL = ("data.", "engine.device=", "threads=", "workers=")
"""What a site may set for itself, where its files or its machine differ."""
TOLD = (PolicyError, TrainingError, UpdateRefusedError)
"""Errors whose words may leave the site. Others could name files: of them only the code does."""
FREE = ("evaluate", "export", "verdict")
"""Requests that train nothing: a job whose budget is gone may still end."""
Notify = Callable[[dict[str, Any]], None]
Answer = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class _Training:
    """One training of a job, opened: ``asked`` are job, part and experiment as the coordinator sent them.

    ``trains``: whether its budget was looked at, so that it may be trained.
    """

    asked: tuple[str, str, str]
    trains: bool
    job: Path
    path: Path
    task: Prepared
    site: Site


@dataclass(kw_only=True)
class Worker:
    """Answers requests of one site, one at a time.

    Args:
        kit: says who the site is. policy: has the last word. data: its images, which stay here.
        state: directory of its own. overrides: ``key=value`` of :data:`LOCAL`. notify: called with events, for a log.
    """

    kit: Kit
    policy: Policy
    data: Path
    state: Path
    overrides: Sequence[str] = ()
    notify: Notify = lambda event: None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _open: _Training | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        wrong = [one for one in self.overrides if not one.startswith(LOCAL)]
        if wrong:
            fix = "the coordinator's experiment decides everything else; here: data.*, engine.device, threads, workers"
            raise ConfigError(
                "a site cannot set this for itself", where=wrong[0].split("=")[0], fix=fix, code="override"
            )

    @property
    def site(self) -> str:
        """Return the site's name, as its kit has it."""
        return str(self.kit.site)

    def answer(self, header: Mapping[str, Any], arrays: Arrays) -> Answer:
        """Return header and arrays of the answer; what goes wrong is told as a failure, in words that may leave."""
        kind = header.get("kind")
        event = {"event": "request", "kind": str(kind)[:20], "round": header.get("round"), "site": self.site}
        try:
            with self._lock:
                found = self._answer(header, arrays)
                if self._open is not None:
                    event |= {"method": self._open.task.method.name, "control": bool(header.get("part"))}
            self.notify(event)
            return found
        except TOLD as error:
            return self._failed(event, error, error.reason, error.fix)
        except ConfrereError as error:
            return self._failed(event, error, f"the site reports the error {error.code}", "look at the site's log")
        except (MemoryError, torch.OutOfMemoryError):
            told = failure("the site ran out of memory", "lower train.batch_size", "out-of-memory")
            self.notify({**event, "event": "failure", **told["failure"]})
            return told, {}
        except Exception as error:  # a bug: its text may hold anything, where it was does not
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"internal error {type(error).__name__} [{Path(at.filename).name}, line {at.lineno}]"
            told = failure(what, "report it", "internal")
            self.notify({**event, "event": "failure", **told["failure"]})
            return told, {}

    def _failed(self, event: dict[str, Any], error: ConfrereError, reason: str, fix: str) -> Answer:
        self.notify({**event, "event": "failure", "code": error.code, "reason": error.reason, "fix": error.fix})
        return failure(reason, fix, error.code), {}

    def _answer(self, header: Mapping[str, Any], arrays: Arrays) -> Answer:
        training = self._training(header)
        task, site, kind = training.task, training.site, header["kind"]
        if kind == "describe":
            return self._describe(training.job, task, site), {}
        if kind == "export":
            return self._export(training, header, arrays), {}
        if kind == "verdict":
            return {"verdicts": self._verdicts(training.job, task.experiment)}, {}
        request = states.asked(header, arrays)
        check_request(self.policy, request)
        check_received(request.state)
        if site.hides and (request.kind, request.split) == ("evaluate", "test"):
            examine_once(training.path, request)
        torch.set_num_threads(threads(task.experiment, task.federation))
        if site.ledger is None and kind not in FREE:
            sends = bool(task.method.sends) or site.hides is None  # training losses and scores do leave then
            enter_unhidden(self.state / FILE, self._name(training.path), sends=sends)
        return states.answer(site.handle(request))

    def _training(self, header: Mapping[str, Any]) -> _Training:
        """Return what a request is for: as it was opened for the one before, or opened now.

        Raises:
            UpdateRefusedError: another format, or another experiment under the same name.
            PolicyError: the site's policy forbids it.
            ConfigError: the experiment is wrong.
        """
        if header.get("protocol") != PROTOCOL:
            said = header.get("protocol")
            what = f"the coordinator speaks format {said if type(said) is int else '?'}, this site format {PROTOCOL}"
            raise UpdateRefusedError(what, fix="install the same version of confrere everywhere", code="version")
        job, part, text = (header.get(key) for key in ("job", "part", "experiment"))
        known = isinstance(job, str) and JOB.fullmatch(job) and isinstance(part, str) and isinstance(text, str)
        if not known:
            raise UpdateRefusedError("a request is not understood", fix=SAME, code="message-form")
        asked, trains = (str(job), str(part), str(text)), header.get("kind") not in FREE
        if self._open is None or self._open.asked != asked or (trains and not self._open.trains):
            self._open = self._opened(*asked, trains=trains)
        return self._open

    def _opened(self, name: str, part: str, text: str, *, trains: bool) -> _Training:
        """Return a training with its data read and its backbone loaded; the experiment of a job never changes."""
        job, whole = self.state / name, self._experiment(self.state / name, part, text.encode())
        experiment = whole.for_method(part) if part else whole
        path = job / "controls" / part if part else job
        self._open = None  # two backbones need not fit; what was refused above closes nothing
        check(self.policy, experiment, examples=None)
        if trains:
            check_ever(self.policy, self.state / FILE, budgets(whole, name))
        task = prepare(experiment, self._federation(job, experiment), self.notify)
        site = make_site(task, self.site, Run(path))
        if site.ledger is not None:  # one record of all jobs: it stays when the folder of a job goes
            site.ledger = replace(site.ledger, file=self.state / FILE, training=self._name(path))
        if experiment.masked:
            site.secure = self._participant(experiment, path)
        check(self.policy, experiment, examples=len(site.data.rows("train")))
        return _Training((name, part, text), trains, job, path, task, site)

    def _experiment(self, job: Path, part: str, content: bytes) -> Experiment:
        """Return the experiment of a job as it is carried out here; the first one is written down."""
        asked = validate(_values(content))
        if simulated(asked):
            what, fix = "this is a simulation", "leave it out, or run in one process: confrere run"
            raise PolicyError(what, where=simulated(asked)[0], fix=fix, code="simulation")
        if part not in ("", *asked.other_controls):
            raise UpdateRefusedError("a request is for no training of this job", fix=SAME, code="message-form")
        if not (job / "asked.toml").exists():
            write_bytes(job / "asked.toml", content)
        elif (job / "asked.toml").read_bytes() != content:
            what, fix = "the experiment of a job was changed", "start a new run for another experiment"
            raise UpdateRefusedError(what, fix=fix, code="job-changed")
        own = {"path": str(self.data.resolve()), "track": ()}
        full = validate({**override(_values(content), self.overrides), **own})
        if not (job / "experiment.toml").exists():
            write_bytes(job / "experiment.toml", full.toml().encode())
        return full

    def _name(self, path: Path) -> str:
        """Return what a training is called in the record of what was spent."""
        return path.relative_to(self.state).as_posix()

    def _participant(self, experiment: Experiment, path: Path) -> Participant:
        """Return what masks this site's updates, known to the others by the key in its kit."""
        pem, choice = self.kit.folder / "identity.key", experiment.secure
        identity = Identity.load(pem.read_bytes(), where=str(pem))
        own = path / "sites" / self.site
        roster = self.kit.identities
        return Participant(self.site, identity, roster, threshold=choice.threshold, clip=choice.clip, folder=own)

    def _federation(self, job: Path, experiment: Experiment) -> Federation:
        size = experiment.data.image_size or default_size(experiment.backbone.name, experiment.backbone.image_size)
        return load_federation(
            self.data,
            options=experiment.data,
            image_size=size,
            seed=experiment.split_seed,
            cache=cache_dir(),
            splits=job / "splits.csv",
            only=self.site,
        )

    def _describe(self, job: Path, task: Prepared, site: Site) -> dict[str, Any]:
        """Return what the coordinator must know before round 1: numbers and digests, no name of a file or patient."""
        federation = task.federation
        return {
            "site": self.site,
            "versions": {**machine(), "flwr": _version("flwr")},
            "protocol": PROTOCOL,
            "classes": list(federation.classes),
            "strata": list(federation.strata),
            "image_size": list(federation.image_size),
            "synthetic": federation.synthetic,
            "data": keyed(job, federation.digest) if site.hides else federation.digest,
            "sheet": federation.sheet["sites"][self.site],
            "warnings": federation.sheet["warnings"],
            "weight": site.weight,
            "backbone": task.describe(),
        }

    def _export(self, training: _Training, header: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
        """Write what the site takes home: its adapters, and results.json with its own numbers."""
        task, site = training.task, training.site
        request = states.asked({**header, "kind": "evaluate"}, arrays)
        results = header.get("results")
        if not isinstance(results, dict) or not isinstance(results.get("sites"), dict):
            raise UpdateRefusedError("the results are not understood", fix="use the same version", code="message-form")
        entry = results["sites"].get(self.site, {})
        if "temperature" in entry:
            about = About(self.site, request.model, task.federation.classes, float(entry["temperature"]))
            folder = training.path / "adapters" / self.site
            export_model(folder, task.method, site.backbone, site.params(request), about)
        write_json(training.path / "results.json", results)
        return {"exported": self.site}

    def _verdicts(self, job: Path, experiment: Experiment) -> dict[str, Any]:
        """Return whether joining paid here, which only the site can compute: test predictions never leave it."""
        controls = trainings(job, experiment)[1:]
        done = {path.name: path for path in controls if (path / "results.json").exists()}
        metric = experiment.build_task().headline
        found = verdicts(job, done, [self.site], seed=experiment.seed, metric=metric)
        write_json(job / "verdicts.json", found)
        return dict(found["sites"][self.site])


def _values(content: bytes) -> dict[str, Any]:
    try:
        return intake.parse_toml(content)
    except ValueError:
        raise UpdateRefusedError("the experiment cannot be read", fix=SAME, code="message-form") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"

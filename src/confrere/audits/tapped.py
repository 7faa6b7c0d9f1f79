"""A finished run as an attacker has it: what each site was sent and sent, what it took home, and how it was trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from confrere.config import Experiment
from confrere.data.federation import Federation
from confrere.data.paths import RESERVED as POOLED
from confrere.errors import ConfigError, RunError
from confrere.federation.budget import UNIT, privacy_said
from confrere.federation.loop import federate
from confrere.federation.secure.total import SUMS, read_total
from confrere.federation.transport import InProcess
from confrere.fingerprint import digest_of, stamp, stored_experiment
from confrere.job import Prepared, initial, make_gate, make_site, plan, prepare, threads
from confrere.learner import predict
from confrere.method import Method, Request
from confrere.opening import open_data
from confrere.prefix import cache_dir, tokens
from confrere.privacy import epsilon
from confrere.record.files import read_json
from confrere.record.machine import cores, most_threads
from confrere.record.run import Run
from confrere.tensors import State, Tensors, digest
from confrere.tokenset import TokenSet

MODELS = ("general", "update", "personalised")
"""What is attacked: the aggregate that all are sent, a site's own answer, which the server sees, its own model."""
Splits = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """Differential privacy of one patient, or image, more or less; ``unit``: ``hospital``, ``record`` or ``patient``.

    Where whole hospitals are hidden, a patient for another *replaces* a hospital's update by another one, whose epsilon
    and delta these are.
    """

    unit: str
    epsilon: float
    delta: float

    def covers(self, model: str) -> bool:
        """Return whether ``model`` is behind the noise: a site's answer if the site made it; its own model never."""
        return model == "general" or (model == "update" and self.unit != UNIT)

    def of_patient(self, images: int) -> tuple[float, float, int]:
        """Return epsilon and delta of a patient of so many images, and how many such steps part members from others.

        Group privacy, where the unit is an image. Where splits have fixed sizes a patient is a member *in place of*
        another: two steps, one patient less and one more; to replace a hospital's update is one.
        """
        k, steps = images if "record" in self.unit else 1, 1 if self.unit == UNIT else 2
        if self.epsilon * k > 700:
            return self.epsilon * k, 1.0, steps
        return self.epsilon * k, min(1.0, k * float(np.exp((k - 1) * self.epsilon)) * self.delta), steps


@dataclass(frozen=True, kw_only=True)
class AuditedRun:
    """A finished training, opened for audits.

    ``round`` is the one whose models were chosen; ``memo`` keeps what one audit found out and another needs.
    """

    path: Path
    task: Prepared
    round: int
    results: Mapping[str, Any]
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def experiment(self) -> Experiment:
        """Return its choices."""
        return self.task.experiment

    @property
    def method(self) -> Method:
        """Return what was trained."""
        return self.task.method

    @property
    def federation(self) -> Federation:
        """Return its sites' images, patients and splits."""
        return self.task.federation

    @property
    def data(self) -> Mapping[str, TokenSet]:
        """Return every site's images after the frozen prefix."""
        return self.task.data

    @property
    def run(self) -> Run:
        """Return its directory."""
        return Run(self.path)

    @property
    def sites(self) -> list[str]:
        """Return the sites that trained, sorted."""
        return self.task.training_sites

    @property
    def guarantee(self) -> Guarantee | None:
        """Return what the run's noise promises a patient; None without noise, or if it can be taken off.

        Epsilon of a hospital added or removed is that of sums which move by the clip S; another patient moves them
        by up to 2 S, the difference of two updates: half as much noise counts.
        """
        said = self.results.get("privacy") or self._said()
        if said.get("epsilon") is None or said.get("simulation"):
            return None
        value, delta, unit = float(said["epsilon"]), float(said["delta"]), str(said["unit"])
        if unit == UNIT and said.get("neighbours") != "replace-one":
            sigma, releases = float(said["sigma"]), int(said["debits"])
            value = epsilon(sigma, rounds=releases, delta=delta, sampling="all", neighbours="replace-one")
        return Guarantee(unit=unit, epsilon=value, delta=delta)

    def _said(self) -> Mapping[str, Any]:
        """Return what a training that nobody examined says: that of its debits so far."""
        ledgers = {name: make_site(self.task, name, self.run).ledger for name in self.sites}
        each = {name: {"privacy": one.said()} for name, one in ledgers.items() if one is not None}
        budget = plan(self.task, "").budget
        found: Mapping[str, Any] = privacy_said(budget, self.method, self.run, each).get("privacy", {})
        return found

    def server(self, round_: int) -> State | None:
        """Return the server's state after a round; None if it is not kept."""
        return self.run.server(round_) if self.run.server_file(round_).exists() else None

    def broadcast(self, site: str, round_: int) -> State | None:
        """Return what a site was sent in a round, which counts from 1; None if it is not kept."""
        before = self.server(round_ - 1)
        return None if before is None else self.method.broadcast(before, site)

    def reply(self, site: str, round_: int) -> State | None:
        """Return what a site sent in a round; None if it is not kept, sent nothing, or the server got but a sum."""
        if self.experiment.masked:
            return None
        store = self.run.store(site)
        return store.read(round_)[1].state or None if store.file(round_).exists() else None

    def total(self, round_: int) -> State | None:
        """Return what the server got of a round under secure aggregation: the mean of all sites. None without."""
        received = self.broadcast(self.sites[0], round_)
        if not self.experiment.masked or received is None:
            return None
        return read_total(self.path / SUMS, round_).mean(received)

    def params(self, site: str, model: str) -> Tensors | None:
        """Return the tensors of a model at a site; None where the method or the attacker has no such model.

        ``update`` is the general model as the site's last answer would make it: no average hides it.
        """
        server = self.run.server(self.round)
        received = self.method.broadcast(server, site)
        general = model in ("general", "update")
        if general and not self.method.has_general():
            return None
        own = make_site(self.task, site, self.run)
        if model == "update":
            sent = (self._last_reply(site) or {}).get("shared", {})
            if _form(sent) != _form(received.get("shared", {})):
                return None  # what is sent is no model of its own, such as a part that the server assembles
            received = {**received, "shared": sent}
        kind = "general" if general else "personalised"
        found = own.params(Request(kind="evaluate", round=self.round, state=received, model=kind))  # type: ignore[arg-type]
        if model == "personalised" and self.method.has_general() and digest({"": found}) == self._general(site):
            return None  # the site has nothing of its own
        return found

    def _general(self, site: str) -> str:
        found = self.params(site, "general")
        return digest({"": found}) if found is not None else ""

    def _last_reply(self, site: str) -> State | None:
        said = (self.reply(site, round_) for round_ in range(self.round, 0, -1))
        return next((state for state in said if state is not None), None)

    def logits(self, site: str, model: str, rows: np.ndarray) -> Tensor | None:
        """Return outputs (len(rows), classes) of a model for images of a site; None where there is no such model."""
        key = "logits", site, model, rows.tobytes()
        if key not in self.memo:
            params = self.params(site, model)
            if params is None:
                return None
            backbone, scores = self.task.backbone_of(site), self.method.scores
            self.memo[key] = predict(backbone, params, self.data[site], rows, scores=scores)
        found: Tensor = self.memo[key]
        return found

    def train_again(self, name: str, splits: Splits, labels: Splits | None = None) -> AuditedRun:
        """Return the same training on other images of the same sites: same method, seed and rounds, up to ``round``.

        It is kept under ``audits/references`` and found again. Nothing is masked, nobody attacks.

        Args:
            name: of its directory.
            splits: site -> int8 (N,), 0 train, 1 val, 2 test; every site needs a training image.
            labels: site -> int64 (N,), instead of the true ones.
        """
        told = hashlib.sha256(f"{digest_of(self.experiment)} {self.federation.digest} {self.round}".encode())
        for site in sorted(splits):
            told.update(site.encode() + splits[site].astype(np.int8).tobytes())
        for site in sorted(labels or {}):
            told.update(site.encode() + (labels or {})[site].astype(np.int64).tobytes())
        folder = self.path / "audits" / "references" / f"{name}-{told.hexdigest()[:12]}"
        task, run = self._with(splits, labels or {}), Run(folder)
        if run.last_round() < self.round:
            _train(task, run, self.round)
        return AuditedRun(path=folder, task=task, round=self.round, results={})

    def _with(self, splits: Splits, labels: Splits) -> Prepared:
        experiment = self.experiment.model_copy(
            update={"secure": self.experiment.secure.model_copy(update={"aggregation": False})}
        )
        parts = tuple(replace(site, split=splits.get(site.name, site.split)) for site in self.federation.sites)
        data = {name: replace(rows, split=splits.get(name, rows.split)) for name, rows in self.data.items()}
        if experiment.train.views > 1:  # other images train: their orientations are not there yet
            views = experiment.train.views
            data = {
                site.name: tokens(
                    self.task.backbone_of(site.name), site, self.federation.classes, cache_dir(), None, views
                )
                for site in parts
            }
        data = {name: replace(rows, labels=labels.get(name, rows.labels)) for name, rows in data.items()}
        federation = replace(self.federation, sites=parts)
        return replace(self.task, experiment=experiment, federation=federation, data=data)


def _form(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _train(task: Prepared, run: Run, rounds: int) -> None:
    """Run the rounds of a reference, judged once, at the end."""
    experiment, method = task.experiment, task.method
    names = [*task.data, *([POOLED] if method.pools else [])]
    sites = {name: make_site(task, name, run) for name in names}
    each = (experiment.threads or most_threads()) if method.pools else threads(experiment, task.federation)
    torch.set_num_threads(each)
    transport = InProcess(sites, 1 if method.pools else experiment.workers or max(1, cores() // each))
    mark = stamp(experiment, task.federation)
    way = replace(plan(task, mark), rounds=rounds, every=rounds, patience=0, keep=1)
    server = method.init_server(initial(task, ""))
    if way.budget is not None:
        server = method.expecting(server, way.budget.expected)
    gate = make_gate(task, {name: site.weight for name, site in sites.items()}, mark)
    with run.lock():
        federate(method, server, transport, way, run, gate=gate, defence=experiment.build_defence())


def open_run(path: Path, data: Path | None = None) -> AuditedRun:
    """Return a finished run, with its data read and its backbone loaded; ``data`` says where they lie now.

    Raises:
        RunError: no finished run, one across hospitals (whose images and states are elsewhere), or its data changed.
        ConfigError: the task is none of classes.
    """
    experiment = stored_experiment(path)
    if not (path / "results.json").exists():
        raise RunError("the run is not finished", where=str(path), fix=f"confrere resume {path}", code="no-run")
    if (path / "job.json").exists():
        what, fix = "the images of a run across hospitals are not here", "audit a run in one process on data you hold"
        raise ConfigError(what, where=str(path), fix=fix, code="audit")
    if experiment.build_task().target != "label":
        what, fix = "audits ask for the class of an image", "audit a run that tells classes apart"
        raise ConfigError(what, where="task", fix=fix, code="audit")
    if data is not None:
        experiment = experiment.model_copy(update={"path": str(data.resolve())})
    federation = open_data(experiment, path)
    if read_json(path / "federation.json")["digest"] != federation.digest:
        what, fix = "the data changed since this run began", "give the data as they were: --data"
        raise RunError(what, where=str(path), fix=fix, code="data-changed")
    results = read_json(path / "results.json")
    task = prepare(experiment, federation, lambda event: None)
    return AuditedRun(path=path, task=task, round=int(results["round"]), results=results)

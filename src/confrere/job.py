"""One run from data to report: prepare, train, examine, export, compare with the controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from confrere.backbones import Backbone
from confrere.config import Experiment
from confrere.data.federation import Federation
from confrere.data.paths import RESERVED as POOLED
from confrere.examination import examine_sites
from confrere.export import export_adapters
from confrere.federation.attacks import DATA, Attacked, flip_labels
from confrere.federation.budget import budget_of, privacy_said
from confrere.federation.gate import Gate
from confrere.federation.ledger import ledger_of
from confrere.federation.loop import Plan, federate
from confrere.federation.sampling import cohort_size
from confrere.federation.secure.simulated import equip
from confrere.federation.secure.total import SUMS
from confrere.federation.selection import best_round
from confrere.federation.site import Site
from confrere.federation.transport import InProcess, Transport
from confrere.fingerprint import begin, inputs, stamp, trainings
from confrere.initial import initial_params
from confrere.learner import TrainSettings
from confrere.method import Method, Request
from confrere.opening import depth_of, load_backbone, open_data
from confrere.prefix import cache_dir, join, tokens
from confrere.record.files import as_json, file_digest, read_json, write_bytes, write_json, write_state
from confrere.record.machine import cores, most_threads, threads_kept
from confrere.record.run import Run
from confrere.tensors import State, Tensors
from confrere.tokenset import TokenSet
from confrere.verdicts import keep_verdicts, verdicts

Notify = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An experiment with its data read and its backbones loaded, for one method.

    ``backbones`` are one object for all sites of the same depth; the server's, the deepest, stands under "".
    """

    experiment: Experiment
    method: Method
    federation: Federation
    backbones: Mapping[str, Backbone]
    data: Mapping[str, TokenSet]

    @property
    def backbone(self) -> Backbone:
        """Return the server's backbone, which is every site's unless their depths differ."""
        return self.backbones[""]

    def backbone_of(self, site: str) -> Backbone:
        """Return the backbone of a site; the pooled one has the server's."""
        return self.backbones.get(site, self.backbone)

    def describe(self) -> dict[str, Any]:
        """Return what a report says about the backbone, with the ``depths`` of sites where they differ."""
        depths = {site: backbone.depth for site, backbone in self.backbones.items() if site}
        return self.backbone.describe() | ({"depths": depths} if len(set(depths.values())) > 1 else {})

    @property
    def training_sites(self) -> list[str]:
        """Return the sites that take part, sorted."""
        return sorted(site.name for site in self.federation.sites if site.name != self.experiment.hold_out)


@threads_kept()
def run_experiment(
    experiment: Experiment, out: Path, *, notify: Notify = lambda event: None, accept_drift: bool = False
) -> dict[str, Any]:
    """Run the method and its controls into ``out``; continue what an earlier call left unfinished.

    Returns the verdicts (empty without controls). Everything else stands in ``out``.

    Raises:
        RunError: ``out`` holds a run of another experiment, of other data, or (without ``accept_drift``) one that
            began with other packages or threads.
    """
    run = Run(out)
    with run.lock():
        federation = open_data(experiment, out)
        torch.set_num_threads(threads(experiment, federation))
        begin(out, experiment, federation, accept_drift=accept_drift)
        notify({"event": "data", "sheet": federation.sheet})
        names = [str(experiment.method["name"]), *experiment.other_controls]
        for name, part in zip(names, trainings(out, experiment), strict=True):
            if not (part / "results.json").exists():
                notify({"event": "method", "name": name, "rounds": experiment.rounds})
                own = experiment if name == names[0] else experiment.for_method(name)
                train(prepare(own, federation, notify), part, notify)
        if not experiment.controls:
            return {}
        found = compare_with_controls(out, experiment)
        keep_verdicts(run, found)
        return found


def threads(experiment: Experiment, federation: Federation) -> int:
    """Return how many threads one site's tensor operations use: as given, or its share of the cores."""
    return experiment.threads or min(most_threads(), max(1, cores() // len(federation.sites)))


def load_backbones(experiment: Experiment, federation: Federation) -> dict[str, Backbone]:
    """Return every site's backbone, one object for all of the same depth, and the server's under ""."""
    depths = {name: depth_of(experiment, federation, name) for name in ("", *(site.name for site in federation.sites))}
    made = {depth: load_backbone(experiment, federation, depth) for depth in dict.fromkeys(depths.values())}
    return {name: made[depth] for name, depth in depths.items()}


def prepare(experiment: Experiment, federation: Federation, notify: Notify) -> Prepared:
    """Load the backbones for the method's adapters and compute (or find) every image's frozen prefix."""
    method = experiment.build_method()
    torch.set_num_threads(experiment.threads or most_threads())  # bits of the prefix do not depend on it
    backbones = load_backbones(experiment, federation)

    def progress(site: str, done: int, total: int) -> None:
        notify({"event": "prefix", "site": site, "done": done, "total": total})

    classes, cache = federation.classes, cache_dir()
    views = {site.name: 1 if site.name == experiment.hold_out else experiment.train.views for site in federation.sites}
    data = {
        site.name: tokens(backbones[site.name], site, classes, cache, progress, views[site.name])
        for site in federation.sites
    }
    return Prepared(experiment=experiment, method=method, federation=federation, backbones=backbones, data=data)


def train(task: Prepared, path: Path, notify: Notify = lambda event: None) -> None:
    """Train in this process: run the rounds, examine the chosen one, export every site's adapters."""
    run, experiment, method = Run(path), task.experiment, task.method
    sites = {name: make_site(task, name, run) for name in task.data}
    if method.pools:  # one site trains: it takes all cores
        sites[POOLED] = make_site(task, POOLED, run)
        each, workers = experiment.threads or most_threads(), 1
    else:
        each = threads(experiment, task.federation)
        workers = experiment.workers or max(1, cores() // each)
    torch.set_num_threads(each)

    def export(results: Mapping[str, Any], chosen: int) -> None:
        export_adapters(path / "adapters", method, run.server(chosen), sites, results, chosen)

    weights, choice = {name: site.weight for name, site in sites.items()}, experiment.secure
    own = run.path / "sites"
    roster = equip(sites, own, threshold=choice.threshold, clip=choice.clip) if experiment.masked else None
    lead(task, run, InProcess(sites, workers), weights, export, stamp(experiment, task.federation), notify, roster)


def lead(
    task: Prepared,
    run: Run,
    transport: Transport,
    weights: Mapping[str, float],
    export: Callable[[Mapping[str, Any], int], None],
    run_stamp: str,
    notify: Notify = lambda event: None,
    roster: Mapping[str, bytes] | None = None,
) -> None:
    """Run the rounds over any transport, choose one by validation data, examine it on test data, export, finish.

    Args:
        task: its data are not needed.
        run: where the server's states, the journal and the results go.
        transport: reaches the sites.
        weights: registered, of every site.
        export: takes results.json and the chosen round.
        run_stamp: marks all messages.
        notify: called with every event.
        roster: public identities of all sites, by which the messages of secure aggregation are checked.
    """
    experiment, method, started = task.experiment, task.method, time.perf_counter()
    write_json(run.path / "backbone.json", task.describe())
    way = plan(task, run_stamp)
    server = method.init_server(initial(task, ""))
    if way.budget is not None:
        server = method.expecting(server, way.budget.expected)
    if not any(event["event"] == "inputs" for event in run.events()):
        run.append(inputs(experiment, task.federation, task.describe()))
    over = attacked(transport, experiment) if method.sends and not method.pools else transport
    gate = make_gate(task, weights, run_stamp)
    defence = experiment.build_defence(roster, run.path / SUMS)
    federate(method, server, over, way, run, notify, gate=gate, defence=defence)
    chosen = best_round(run.events())
    notify({"event": "examine", "round": chosen})
    names = [site.name for site in task.federation.sites]
    results = examine_sites(experiment, task.federation.classes, names, run, transport, chosen)
    results |= privacy_said(way.budget, method, run, results["sites"])
    export(results, chosen)
    results["seconds"] = round(time.perf_counter() - started, 1)
    finish(run, run.path, results)


def plan(task: Prepared, run_stamp: str) -> Plan:
    """Return how many rounds a task takes, and who trains and judges."""
    experiment, pools, training = task.experiment, task.method.pools, tuple(task.training_sites)
    return Plan(
        rounds=experiment.rounds,
        seed=experiment.seed,
        fraction=experiment.federation.fraction,
        min_replies=1 if pools else experiment.federation.min_replies,
        every=experiment.selection.every,
        patience=experiment.selection.patience,
        run=run_stamp,
        keep=experiment.record.keep,
        train=(POOLED,) if pools else training,
        judge=training,
        sampling="fixed" if pools else experiment.federation.sampling,
        budget=budget_of(task.method, experiment.federation, experiment.privacy, len(training)),
    )


def make_gate(task: Prepared, weights: Mapping[str, float], run_stamp: str) -> Gate:
    """Return what every answer passes; sites of equal rank and depth send the same form, drawn once."""
    experiment, forms = task.experiment, dict[tuple[int, int], Tensors]()

    def expected(site: str, asked: Request) -> State:
        kind = (experiment.adapter.rank_of(site), task.backbone_of(site).depth)
        if kind not in forms:
            forms[kind] = initial(task, site)
        return task.method.payload(forms[kind], asked.state, asked.round, experiment.rounds)

    return Gate(method=task.method, run=run_stamp, expected=expected, weights=weights, **experiment.gate.model_dump())


def attacked(transport: Transport, experiment: Experiment) -> Transport:
    """Return the transport with the simulated attackers of an experiment, if it has any."""
    attack = experiment.attack
    if not attack.sites:
        return transport
    return Attacked(transport, attack.name, attack.sites, attack.strength, experiment.seed)


def finish(run: Run, path: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, which says that the training is done; before it, the journal's digests of what was made."""
    content = as_json(results)
    made = [f for f in sorted((path / "adapters").rglob("*")) if f.is_file()]
    files = {f.relative_to(path).as_posix(): file_digest(f) for f in made}
    files["results.json"] = sha256(content).hexdigest()
    run.append({"event": "end", "round": results["round"], "files": files})
    write_bytes(path / "results.json", content)


def make_site(task: Prepared, name: str, run: Run) -> Site:
    """Return one simulated hospital, or the pooled one."""
    experiment, choice = task.experiment, task.experiment.train
    data = join([task.data[s] for s in task.training_sites]) if name == POOLED else task.data[name]
    cohort = cohort_size(experiment.federation.fraction, len(task.training_sites))
    steps = choice.steps * (cohort if name == POOLED else 1)  # as many as all asked sites together
    if experiment.attack.name in DATA and name in experiment.attack.sites and task.method.sends:
        data = flip_labels(data, experiment.attack.strength, experiment.seed, name)
    store = run.store(name)
    settings = TrainSettings(**{**choice.model_dump(), "steps": steps})

    def keep(model: str, predictions: Tensors) -> None:
        write_state(store.folder / f"test-{model}.safetensors", {"test": predictions}, {"site": name})

    return Site(
        name=name,
        method=task.method,
        backbone=task.backbone_of(name),
        data=data,
        initial=partial(initial, task, name),
        store=store,
        seed=experiment.seed,
        rounds=experiment.rounds,
        keep=keep,
        settings=settings,
        weight=float(len(data.rows("train"))) if experiment.federation.weights == "images" else 1.0,
        val_limit=experiment.selection.images or None,
        ledger=ledger_of(task.method, experiment.privacy, settings, data, experiment.rounds, store.folder),
        hides=experiment.privacy if experiment.privacy.at_sites and not task.method.pools else None,
    )


def initial(task: Prepared, site: str) -> Tensors:
    """Return what is trained, before training; see :func:`confrere.initial.initial_params`."""
    rank_of, classes = task.experiment.adapter.rank_of, len(task.federation.classes)
    options = {"classes": classes, "rank": rank_of(site), "full": rank_of(""), "seed": task.experiment.seed}
    return initial_params(task.backbone_of(site), task.method, site, **options)


def compare_with_controls(out: Path, experiment: Experiment) -> dict[str, Any]:
    """Return the verdicts on a run: its comparison with each control at every site that trained."""
    controls = {path.name: path for path in trainings(out, experiment)[1:]}
    sites = [s for s, entry in read_json(out / "results.json")["sites"].items() if not entry["held_out"]]
    return verdicts(out, controls, sites, seed=experiment.seed, metric=experiment.build_task().headline)

"""One run from data to report: prepare, train, examine, export, compare with the controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from confrere.adapters import lora
from confrere.backbones import REGISTRY, Backbone, default_size, load
from confrere.config import Experiment, read, validate
from confrere.data.federation import Federation, load_federation
from confrere.data.numbers import holds_numbers
from confrere.data.paths import RESERVED as POOLED
from confrere.errors import ConfigError, RunError
from confrere.examination import examine_sites
from confrere.export import export_adapters
from confrere.federation.loop import Plan, best_round, cohort_size, federate
from confrere.federation.site import Site
from confrere.federation.transport import InProcess
from confrere.initial import initial_params
from confrere.learner import TrainSettings
from confrere.method import Method
from confrere.prefix import cache_dir, join, tokens
from confrere.record.files import read_json, write_bytes, write_json, write_state
from confrere.record.machine import cores, machine
from confrere.record.run import Run
from confrere.tensors import Tensors
from confrere.tokenset import TokenSet
from confrere.verdicts import verdicts

Notify = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """An experiment with its data read and its backbone loaded, for one method."""

    experiment: Experiment
    method: Method
    federation: Federation
    backbone: Backbone
    data: Mapping[str, TokenSet]

    @property
    def training_sites(self) -> list[str]:
        """Return the sites that take part, sorted."""
        return sorted(name for name in self.data if name != self.experiment.hold_out)


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
        _begin(out, experiment, federation, accept_drift=accept_drift)
        notify({"event": "data", "sheet": federation.sheet, "classes": list(federation.classes)})
        names = [str(experiment.method["name"]), *experiment.controls]
        for name in dict.fromkeys(names):
            part = out if name == names[0] else out / "controls" / name
            if not (part / "results.json").exists():
                notify({"event": "method", "name": name, "rounds": experiment.rounds})
                own = experiment if name == names[0] else experiment.for_method(name)
                train(prepare(own, federation, notify), part, notify)
        return write_verdicts(out, experiment) if experiment.controls else {}


def threads(experiment: Experiment, federation: Federation) -> int:
    """Return how many threads one site's tensor operations use: as given, or its share of the cores."""
    return experiment.threads or max(1, cores() // len(federation.sites))


def open_data(experiment: Experiment, out: Path) -> Federation:
    """Return the federation of an experiment with the split of ``out`` (written there the first time)."""
    spec = experiment.backbone
    _check_kind(experiment)
    size = experiment.data.image_size or default_size(spec.name, spec.image_size)
    federation = load_federation(
        Path(experiment.path),
        options=experiment.data,
        image_size=size,
        seed=experiment.split_seed,
        cache=cache_dir(),
        splits=out / "splits.csv",
    )
    if experiment.hold_out is not None:
        federation.site(experiment.hold_out)  # DataError names the sites when there is none of this name
        if len(federation.sites) < 2:
            raise ConfigError("the only site cannot be held out", where="hold_out", fix="leave it out")
    trainers = len(federation.sites) - (experiment.hold_out is not None)
    asked = cohort_size(experiment.federation.fraction, trainers)
    if experiment.federation.min_replies > asked:
        raise ConfigError(
            f"{experiment.federation.min_replies} replies are needed, but only {asked} sites are asked a round",
            where="federation.min_replies",
            fix=f"use at most {asked}",
        )
    return federation


def _check_kind(experiment: Experiment) -> None:
    """Refuse a backbone for images on a table of numbers, and the other way round."""
    name = experiment.backbone.name
    reads = name in REGISTRY and REGISTRY[name].kind == "numbers"
    given = holds_numbers(Path(experiment.path), experiment.data)
    if reads != given:
        raise ConfigError(
            f"{name} reads {'rows of numbers' if reads else 'images'}, the data are "
            f"{'rows of numbers' if given else 'images'}",
            where="backbone.name",
            fix="use backbone.name=mlp" if given else "use a backbone for images, see `confrere backbones`",
        )
    if given and experiment.train.views > 1:
        raise ConfigError("rows of numbers have one orientation", where="train.views", fix="use train.views=1")


def load_backbone(experiment: Experiment, federation: Federation) -> Backbone:
    """Return the frozen model with room for what the method trains."""
    method, spec, adapter = experiment.build_method(), experiment.backbone, experiment.adapter
    return load(
        spec.name,
        lora=lora.LoraSpec(
            slots=method.all_slots,
            blocks=adapter.blocks,
            targets=adapter.targets,
            scale=adapter.scale,
            dropout=adapter.dropout,
            **method.extensions,
        ),
        depth=spec.depth or (REGISTRY[spec.name].keep if spec.name in REGISTRY else None),
        image_size=federation.image_size,
        sha256=spec.sha256,
        device=experiment.engine.device,
        precision=experiment.engine.precision,
    )


def prepare(experiment: Experiment, federation: Federation, notify: Notify) -> Task:
    """Load the backbone for the method's adapters and compute (or find) every image's frozen prefix."""
    method = experiment.build_method()
    torch.set_num_threads(experiment.threads or cores())  # bits of the prefix do not depend on it
    backbone = load_backbone(experiment, federation)

    def progress(site: str, done: int, total: int) -> None:
        notify({"event": "prefix", "site": site, "done": done, "total": total})

    classes, cache = federation.classes, cache_dir()
    data = {
        site.name: tokens(
            backbone, site, classes, cache, progress, 1 if site.name == experiment.hold_out else experiment.train.views
        )
        for site in federation.sites
    }
    return Task(experiment=experiment, method=method, federation=federation, backbone=backbone, data=data)


def train(task: Task, path: Path, notify: Notify = lambda event: None) -> None:
    """Run the rounds, choose one by validation data, examine it on test data, export its adapters."""
    run, experiment, method = Run(path), task.experiment, task.method
    write_json(path / "backbone.json", task.backbone.describe())
    started = time.perf_counter()
    sites = {name: make_site(task, name, run) for name in task.data}
    if method.pools:
        sites[POOLED] = make_site(task, POOLED, run)
    plan = Plan(
        rounds=experiment.rounds,
        seed=experiment.seed,
        fraction=experiment.federation.fraction,
        min_replies=1 if method.pools else experiment.federation.min_replies,
        every=experiment.selection.every,
        patience=experiment.selection.patience,
        train=(POOLED,) if method.pools else tuple(task.training_sites),
        judge=tuple(task.training_sites),
    )
    server = method.init_server(initial(task, ""))
    each = threads(experiment, task.federation)
    if method.pools:  # one site trains: it takes all cores
        torch.set_num_threads(experiment.threads or cores())
        transport = InProcess(sites)
    else:
        torch.set_num_threads(each)
        transport = InProcess(sites, experiment.workers or max(1, cores() // each))
    federate(method, server, transport, plan, run, notify)
    events = run.events()
    chosen = best_round(events)
    notify({"event": "examine", "round": chosen})
    results = examine_sites(experiment, task.federation.classes, list(task.data), run, transport, chosen)
    export_adapters(path / "adapters", task.backbone, method, run.server(chosen), sites, results, chosen)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(path / "results.json", results)


def make_site(task: Task, name: str, run: Run) -> Site:
    """Return one simulated hospital, or the pooled one."""
    experiment, choice = task.experiment, task.experiment.train
    data = join([task.data[s] for s in task.training_sites]) if name == POOLED else task.data[name]
    cohort = cohort_size(experiment.federation.fraction, len(task.training_sites))
    steps = choice.steps * (cohort if name == POOLED else 1)  # as many as all asked sites together
    examples = len(data.rows("train"))
    store = run.store(name)

    def keep(model: str, predictions: Tensors) -> None:
        write_state(store.folder / f"test-{model}.safetensors", {"test": predictions}, {"site": name})

    return Site(
        name=name,
        method=task.method,
        backbone=task.backbone,
        data=data,
        initial=partial(initial, task, name),
        store=store,
        seed=experiment.seed,
        rounds=experiment.rounds,
        keep=keep,
        settings=TrainSettings(**{**choice.model_dump(), "steps": steps}),
        weight=float(examples) if experiment.federation.weights == "images" else 1.0,
        val_limit=experiment.selection.images or None,
    )


def initial(task: Task, site: str) -> Tensors:
    """Return what is trained, before training; see :func:`confrere.initial.initial_params`."""
    experiment, classes = task.experiment, len(task.federation.classes)
    rank, full = experiment.adapter.rank_of(site), experiment.adapter.rank_of("")
    return initial_params(task.backbone, task.method, site, classes=classes, rank=rank, full=full, seed=experiment.seed)


def write_verdicts(out: Path, experiment: Experiment) -> dict[str, Any]:
    """Compare the run with its controls at every site and write verdicts.json."""
    controls = {name: out / "controls" / name for name in experiment.controls if name != experiment.method["name"]}
    sites = [s for s, entry in read_json(out / "results.json")["sites"].items() if not entry["held_out"]]
    found = verdicts(out, controls, sites, seed=experiment.seed)
    write_json(out / "verdicts.json", found)
    return found


def stored_experiment(out: Path) -> Experiment:
    """Return the experiment of a run to resume; RunError when there is no run."""
    if not (out / "experiment.toml").exists():
        raise RunError("no run here", where=str(out), fix="give the --out directory of `confrere run`")
    return validate(read(out / "experiment.toml"))


def _begin(out: Path, experiment: Experiment, federation: Federation, *, accept_drift: bool) -> None:
    """Write what a run begins with, or refuse one that began with something else."""
    now = {**machine(), **experiment.choices()}
    if (out / "experiment.toml").exists():
        then = read_json(out / "machine.json")
        changed = [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in {**now, **then} if then.get(k) != now.get(k)]
        if changed and not accept_drift:
            raise RunError(
                "machine, packages or experiment changed since this run began: " + "; ".join(changed),
                where=str(out),
                fix="restore them, choose another --out, or resume with --accept-drift and give up bit-identity",
            )
        if read_json(out / "federation.json")["digest"] != federation.digest:
            raise RunError("the data changed since this run began", where=str(out), fix="start a new run")
        if changed:
            Run(out).append({"event": "drift", "changed": changed})
        return
    write_json(out / "machine.json", now)
    kept = {
        "name": federation.name,
        "synthetic": federation.synthetic,
        "classes": list(federation.classes),
        "image_size": list(federation.image_size),
        "digest": federation.digest,
        "sheet": federation.sheet,
    }
    write_json(out / "federation.json", kept)
    write_bytes(out / "experiment.toml", experiment.toml().encode())

"""A tiny frozen model and three small synthetic sites for tests."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from confrere import initial
from confrere import methods as _methods  # noqa: F401  fills the registry
from confrere.adapters import lora
from confrere.backbones import Backbone, load
from confrere.federation.loop import Plan, federate
from confrere.federation.site import Site
from confrere.federation.transport import InProcess, Transport
from confrere.learner import Learner, TrainSettings
from confrere.method import Method
from confrere.prefix import join
from confrere.record.run import Run
from confrere.record.store import MemoryStore, Store
from confrere.seeds import numpy_generator
from confrere.tensors import State, Tensors
from confrere.tokenset import TokenSet

CLASSES = ("alpha", "beta", "gamma")
SITES = ("a", "b", "c")


_BACKBONES: dict[lora.LoraSpec, Backbone] = {}


def tiny_backbone(slots: tuple[str, ...] = ("general", "personal"), **extensions: bool) -> Backbone:
    """Return the test backbone with these slots, made once; dropout on, as by default."""
    spec = lora.LoraSpec(slots=slots, blocks=2, **extensions)
    if spec not in _BACKBONES:
        _BACKBONES[spec] = load("test-vit", lora=spec)
    return _BACKBONES[spec]


def backbone_of(method: Method) -> Backbone:
    """Return the test backbone with what a method trains."""
    return tiny_backbone(method.all_slots, **method.extensions)


@functools.cache
def tiny_data(backbone: Backbone, site: str, n: int = 24) -> TokenSet:
    """Return images whose class shows in one colour channel, with a tint of the site."""
    rng = numpy_generator(7, "tiny", site)
    h, w = backbone.image_size
    labels = np.arange(n) % len(CLASSES)
    images = rng.integers(0, 120, size=(n, h, w, 3))
    images[np.arange(n), :, :, labels] += 60
    images[..., SITES.index(site) if site in SITES else 0] += 30
    split = np.array([0, 0, 0, 0, 1, 1, 2, 2] * (n // 8 + 1), dtype=np.int8)[:n]
    tokens = backbone.prefix(images.astype(np.uint8)).numpy()
    return TokenSet(
        tokens=tokens,
        labels=labels.astype(np.int64),
        groups=np.arange(n),
        split=split,
        classes=CLASSES,
        keys=np.arange(n, dtype=np.uint64),
    )


def initial_params(backbone: Backbone, method: Method, site: str, rank: int = 4, seed: int = 0) -> Tensors:
    """Return adapters and head before training, as the job draws them."""
    return initial.initial_params(backbone, method, site, classes=len(CLASSES), rank=rank, seed=seed, full=max(4, rank))


def tiny_learner(method: Method, site: str) -> Learner:
    """Return what a method trains with at ``site`` in round 1."""
    backbone = backbone_of(method)
    settings = TrainSettings(steps=3, batch_size=6)
    data = tiny_data(backbone, site)
    return Learner(backbone=backbone, data=data, settings=settings, seed=0, site=site, round=1, rounds=3)


def tiny_sites(
    method: Method,
    *,
    seed: int = 0,
    rounds: int = 3,
    stores: dict[str, Store] | None = None,
    **settings: object,
) -> dict[str, Site]:
    """Return three sites (and the pooled one where the method asks for it)."""
    backbone = backbone_of(method)
    data = {name: tiny_data(backbone, name) for name in SITES}
    if method.pools:
        data["pooled"] = join(list(data.values()))
    options = {"steps": 3, "batch_size": 6, "lr": 5e-3, **settings}
    return {
        name: Site(
            name=name,
            method=method,
            backbone=backbone,
            data=one,
            initial=functools.partial(initial_params, backbone, method, name, seed=seed),
            store=(stores or {}).get(name) or MemoryStore(),
            settings=TrainSettings(**options),  # type: ignore[arg-type]
            seed=seed,
            rounds=rounds,
            weight=1.0 if method.release() else float(len(one.rows("train"))),
        )
        for name, one in data.items()
    }


def tiny_plan(method: Method, *, rounds: int = 3, seed: int = 0, **changes: object) -> Plan:
    """Return a plan in which the pooled control trains in one place."""
    train = ("pooled",) if method.pools else SITES
    return Plan(**{"rounds": rounds, "seed": seed, "train": train, "judge": SITES, **changes})  # type: ignore[arg-type]


def tiny_run(
    method: Method,
    folder: Path,
    *,
    rounds: int = 3,
    seed: int = 0,
    transport: Transport | None = None,
    disk: bool = False,
    **settings: object,
) -> tuple[State, dict[str, Site]]:
    """Run a method on the tiny federation; return the server's state and the sites."""
    run = Run(folder)
    names = (*SITES, "pooled") if method.pools else SITES
    stores: dict[str, Store] = {n: run.store(n) for n in names} if disk else {}
    sites = tiny_sites(method, seed=seed, rounds=rounds, stores=stores, **settings)
    server = method.init_server(initial_params(backbone_of(method), method, "", seed=seed))
    plan = tiny_plan(method, rounds=rounds, seed=seed)
    return federate(method, server, transport or InProcess(sites), plan, run), sites

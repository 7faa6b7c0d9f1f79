"""The models a newcomer may take: what a finished run offers, as it is, mixed, refitted, or training alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from confrere.adapters import head, lora
from confrere.adapters.algebra import concat, merge_slots, named, pairs
from confrere.adapters.folder import import_
from confrere.backbones import Backbone
from confrere.config import Experiment, read, validate
from confrere.errors import RunError
from confrere.initial import initial_params
from confrere.learner import Learner, predict
from confrere.onboard.newcomer import Newcomer
from confrere.predict import Predictor, read_head
from confrere.record.files import read_json
from confrere.record.run import Run
from confrere.seeds import torch_generator
from confrere.tensors import Tensors
from confrere.tokenset import Batch, TokenSet

SLOT, HEAD, ALONE = "merged", "head.safetensors", "alone"
# Few coefficients on a softmax: AdamW moves each by about this much a step.
_MIXTURE_LR = 0.1


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a finished run offers: its backbone with one slot, and every model as tensors of that slot and a head."""

    experiment: Experiment
    backbone: Backbone
    donors: Mapping[str, Tensors]
    general: Tensors | None
    info: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """One candidate's tensors, the optimiser steps it took, and what was chosen, for the record."""

    params: Tensors
    steps: int = 0
    note: Mapping[str, Any]


Recipe = Callable[[Learner, int], Fitted]


def open_run(run: Path) -> Offer:
    """Return what a finished run offers to a newcomer.

    Raises:
        RunError: see :func:`onboard`.
    """
    infos = {file.parent.name: read_json(file) for file in sorted((run / "adapters").glob("*/head.json"))}
    trained = [name for name, info in infos.items() if info["model"] == "personalised"]
    if not trained or not (run / "results.json").exists():
        raise RunError(
            "no finished run here", where=str(run), fix="finish it first: confrere resume RUN", code="no-run"
        )
    info = infos[trained[0]]
    if info["slots"] != [SLOT]:
        fix = "use a run of a method whose adapters add up, e.g. fedopal, fedit"
        raise RunError(
            f"a model of {info['method']['name']} is more than one adapter", where=str(run), fix=fix, code="onboarding"
        )
    if len({infos[name]["depth"] for name in trained}) > 1:
        fix = "use a run without backbone.depths"
        raise RunError(
            "adapters for different numbers of blocks cannot be mixed", where=str(run), fix=fix, code="onboarding"
        )
    experiment = validate(read(run / "experiment.toml"))
    predictor = Predictor(run, trained[0])
    donors = {}
    for name in trained:
        folder = run / "adapters" / name
        donors[name] = {**import_(folder / SLOT, slot=SLOT, scale=info["scale"]), **read_head(folder / HEAD)}
    general = _general(run, experiment, predictor)
    return Offer(experiment=experiment, backbone=predictor.backbone, donors=donors, general=general, info=info)


def _general(run: Path, experiment: Experiment, predictor: Predictor) -> dict[str, Tensor] | None:
    """Return the model of a hospital that never trained, as one adapter; None when the method makes none."""
    method, adapter = experiment.build_method(), experiment.adapter
    if not method.has_general():
        return None
    server = Run(run).server(read_json(run / "results.json")["round"])
    first = initial_params(
        predictor.backbone,
        method,
        "",
        classes=len(predictor.classes),
        rank=adapter.rank_of(""),
        seed=experiment.seed,
    )
    params = method.personal(method.broadcast(server, ""), method.init_site(first))
    rest = {name: value for name, value in params.items() if lora.slot_of(name) is None}
    return {**merge_slots(params, method.all_slots, into=SLOT), **rest}


def recipes(offered: Offer, rows: TokenSet, new: Newcomer, seed: int) -> dict[str, Recipe]:
    """Return the candidates, simplest first: what each makes of the training rows of a learner."""
    donors, names = offered.donors, list(offered.donors)
    costs = np.full((len(names), len(rows.labels)), np.nan)
    for donor, params in enumerate(donors.values()):
        costs[donor, new.known] = nll(predict(offered.backbone, params, rows, new.known), rows.labels[new.known])

    def losses(learner: Learner) -> Tensor:
        train = learner.data.rows("train")
        return torch.tensor([balanced(cost[train], rows.labels[train]) for cost in costs])

    def general(learner: Learner, steps: int) -> Fitted:
        return Fitted(params=offered.general or {}, note={})

    def best(learner: Learner, steps: int) -> Fitted:
        name = names[int(losses(learner).argmin())]
        return Fitted(params=donors[name], note={"site": name})

    def softmax(learner: Learner, steps: int) -> Fitted:
        return _mixed(donors, (-losses(learner)).softmax(0), 0)

    def learnt(learner: Learner, steps: int) -> Fitted:
        faster = replace(learner, settings=replace(learner.settings, lr=_MIXTURE_LR))
        start = {"mixture": torch.zeros(len(names))}

        def loss(leaves: Tensors, batch: Batch) -> Tensor:
            return learner.loss(mixture(donors, leaves["mixture"].softmax(0).cpu()), batch)

        end = faster.fit(start, loss=loss, steps=steps, tag="mixture")
        return _mixed(donors, end["mixture"].softmax(0), steps)

    def alone(learner: Learner, steps: int) -> Fitted:
        shapes = offered.backbone.adapter_shapes({SLOT: offered.experiment.adapter.rank})
        start = lora.init(shapes, torch_generator(seed, "init", "onboard", learner.site))
        start |= head.init(len(rows.classes), offered.backbone.feature_dim)
        return Fitted(params=learner.fit(start, steps=steps, tag=ALONE), steps=steps, note={})

    as_is: dict[str, Recipe] = {"best site": best, "softmax mixture": softmax, "learnt mixture": learnt}
    as_is = {"general": general, **as_is} if offered.general else as_is
    return {**as_is, **{f"{name} + head": refitted(recipe) for name, recipe in as_is.items()}, ALONE: alone}


def refitted(recipe: Recipe) -> Recipe:
    """Return the recipe with its head trained on, from where it is; one that trains itself shares the steps."""

    def both(learner: Learner, steps: int) -> Fitted:
        first = recipe(learner, steps // 2)
        params = learner.fit(first.params, train=head.NAMES.__contains__, steps=steps - first.steps, tag="head")
        return replace(first, params=params, steps=steps)

    return both


def mixture(donors: Mapping[str, Tensors], weights: Tensor) -> dict[str, Tensor]:
    """Return ``sum_k w_k`` of the donors' products ``B A`` (exactly, at summed rank) and of their heads.

    LoraHub (Huang et al., 2023) averages A and B apart, which adds the products of one donor's B with another's A;
    this does not. ``weights`` (donors,) may carry gradients.
    """
    each = [pairs(params, SLOT) for params in donors.values()]
    parts = list(zip(each, weights, strict=True))
    factors = {layer: concat([(of[layer][0], of[layer][1] * w) for of, w in parts]) for layer in each[0]}
    heads = {
        name: torch.stack([p[name] * w for p, w in zip(donors.values(), weights, strict=True)]).sum(0)
        for name in head.NAMES
    }
    return {**named(factors, SLOT), **heads}


def _mixed(donors: Mapping[str, Tensors], weights: Tensor, steps: int) -> Fitted:
    note = {name: round(float(w), 4) for name, w in zip(donors, weights, strict=True)}
    return Fitted(params=mixture(donors, weights.float()), steps=steps, note={"weights": note})


def nll(logits: Tensor, labels: np.ndarray) -> np.ndarray:
    """Return the cross-entropy (N,) of each image in nats."""
    return np.asarray(torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels), reduction="none"))


def balanced(values: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over the classes present of the mean within each."""
    return float(np.mean([values[labels == k].mean() for k in np.unique(labels)]))

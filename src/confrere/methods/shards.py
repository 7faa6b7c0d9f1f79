"""Adapter shards: one shared model for each part of every site's patients, so that one part is soon forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from confrere.adapters.vectors import side_by_side, split_models
from confrere.backbones import Backbone
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Reply, register
from confrere.methods.ensemble import together
from confrere.tensors import State, Tensors, weighted_mean

Part = tuple[Tensors, float, float]  # of a shard: the trained model, from how many images, mean training loss


def steps_of(steps: int, shards: int, shard: int) -> int:
    """Return the steps of one shard in a round; the first ones get what is left over."""
    return steps // shards + (shard < steps % shards)


@register(
    "shards",
    title="A shared adapter for each part of the patients (SISA)",
    paper="Bourtoule et al., Machine Unlearning, IEEE S&P 2021, arXiv 1912.03817",
)
@dataclass(frozen=True, kw_only=True)
class Shards(Method):
    """Train ``shards`` models, each with its own part of every site's patients; predict by their mean probability.

    Model j is averaged over sites by their training images of shard j; a round's steps are divided among shards. No
    model depends on another shard: to forget a patient, one is trained again (:mod:`confrere.forgetting.shards`).

    Args:
        shards: how many, >= 2.

    Differences from the paper: adapters and heads on one frozen model, trained across sites; a shard follows from a
    hash of the patient's images; no slices within a shard; the mean of probabilities instead of votes. Every shard has
    the whole rank. ``federation.weights`` changes nothing.
    """

    sends: ClassVar[tuple[str, ...]] = ("shared", "parts")
    also_sends: ClassVar[tuple[str, ...]] = ("training images and loss of each shard",)
    targets: ClassVar[tuple[str, ...]] = ("label",)
    stacked: ClassVar[bool] = True

    shards: int = 4

    def __post_init__(self) -> None:
        if self.shards < 2:
            raise ConfigError(f"{self.shards} is too few", where="method.shards", fix="use shards >= 2")

    @property
    def needs(self) -> Literal["sum", "each"]:
        """Every shard has weights of its own."""
        return "each"

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where a shard would have no step."""
        if steps < self.shards:
            what, fix = f"{steps} steps are too few for {self.shards} shards", f"use train.steps={self.shards} or more"
            raise ConfigError(what, where="train.steps", fix=fix)

    def init_server(self, params: Tensors) -> State:
        """Return all models, which start equal."""
        return {"shared": side_by_side([params] * self.shards)}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train each model on its part of the site's patients; one without any stays as it came."""
        models = split_models(received["shared"], self.shards)
        trained, *numbers = zip(*(self.part(learner, m, shard) for shard, m in enumerate(models)), strict=True)
        images, losses = (torch.tensor(each, dtype=torch.float64) for each in numbers)
        learner.metrics["loss"] = float(losses[images > 0].mean())
        return {"shared": side_by_side(trained), "parts": {"images": images, "losses": losses}}, {}

    def part(self, learner: Learner, model: Tensors, shard: int) -> Part:
        """Return what training makes of one model."""
        own = learner.data.rows_of_shard(shard, self.shards)
        if not len(own):
            return model, 0.0, 0.0
        alone = replace(learner, data=learner.data.trained_on(own), metrics={})
        fitted = alone.fit(model, steps=steps_of(learner.settings.steps, self.shards, shard), tag=f"shard {shard}")
        return fitted, float(len(own)), alone.metrics["loss"]

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return all models, and two numbers of each."""
        numbers = {name: torch.zeros(self.shards, dtype=torch.float64) for name in ("images", "losses")}
        return {**self.init_server(params), "parts": numbers}

    def plausible(self, payload: State) -> bool:
        """Return whether images can be counted."""
        return bool((payload["parts"]["images"] >= 0).all())

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average each model over the sites that trained it, by their images; one that none did stays."""
        models = split_models(server["shared"], self.shards)
        came = [(reply.state["parts"]["images"], split_models(reply.state["shared"], self.shards)) for reply in replies]
        for shard in range(self.shards):
            trained = [(float(images[shard]), theirs[shard]) for images, theirs in came if images[shard] > 0]
            models[shard] = weighted_mean(trained) if trained else models[shard]
        return {**server, "shared": side_by_side(models)}

    def scores(self, backbone: Backbone, params: Tensors, tokens: Tensor) -> Tensor:
        """Return class scores (B, K): the logarithm of the shards' mean probability."""
        return together(backbone, split_models(params, self.shards), tokens)

"""Data vectors: every hospital trains alone, once; what training changed is added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from confrere.adapters.vectors import fuse, shares, stack, times
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Reply, one_of, register
from confrere.methods.ensemble import Ensemble
from confrere.tensors import State, Tensors, weighted_mean

PAPER = "Improving the Classification Effect of Clinical Images of Diseases for Multi-Source Privacy Protection"
KEPT = "site."  # prefix of the server's groups that hold each site's newest vector
GRID = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # what ``tuned`` tries as factors of the mean vector


@register("data-vectors", title="Train alone, add up the changes (data vectors)", paper=f"{PAPER}, arXiv 2408.13038")
@dataclass(frozen=True, kw_only=True)
class DataVectors(Ensemble):
    """``theta = theta_pre + sum_j c_j tau_j`` with ``tau_j = theta_j - theta_pre`` of site j, which trained alone.

    Sites start from one adapter of product zero and a head of zero: tau_j is ``s B_j A_j`` of every layer, and head.
    Sums are exact: the mixture has all sites' ranks together, factored anew so that slices are no site's part
    (``ensemble`` keeps them apart and sends them all to all). The server keeps every site's newest vector.

    Args:
        coefficients: ``sum`` (1 each), ``mean`` (1/K), ``images`` (n_j/n) or ``tuned``: the factor of ``GRID`` on the
            mean vector of least validation loss, found in the last round instead of training; only losses are sent.
        predicts: ``fused``, the ``ensemble`` of the sites' models (mean of probabilities) or the site's ``own`` model.
        when: a vector is sent in the ``last`` training round, once, or in ``every`` one (for sites not always asked).

    Differences from the paper: adapters; layer norms keep no statistics to restore, so nothing rescues a sum too large.
    """

    sends: ClassVar[tuple[str, ...]] = ("shared", "scores")
    unequal: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("scores",)
    also_sends: ClassVar[tuple[str, ...]] = ("validation losses, if coefficients are tuned",)
    also_keeps: ClassVar[tuple[str, ...]] = ("copy of the own model",)
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"coefficients": ("choice", "sum", "mean", "images", "tuned")}

    coefficients: str = "mean"
    when: str = "last"

    def __post_init__(self) -> None:
        one_of("method.coefficients", self.coefficients, ("sum", "mean", "images", "tuned"))
        super().__post_init__()
        one_of("method.when", self.when, ("last", "every"))
        if self.predicts == "ensemble" and self.coefficients == "tuned":
            raise ConfigError("an ensemble has no coefficients", where="method.coefficients", fix="use mean")

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where no round is left to tune in."""
        if self.coefficients == "tuned" and rounds < 2:
            raise ConfigError("tuning takes a round after training", where="rounds", fix="use rounds=2")

    def trained(self, rounds: int) -> int:
        """Return the last round in which sites train."""
        return max(1, rounds - 1) if self.coefficients == "tuned" else rounds

    def may_stop(self, round_: int, rounds: int) -> bool:
        """Return whether vectors have been fused, and the factor tuned."""
        return round_ == rounds or (self.when == "every" and self.coefficients != "tuned")

    def broadcast(self, server: State, site: str) -> State:
        """Return nothing before a vector has come, then the mixture."""
        return {"shared": server["shared"]} if "images" in server else {}

    def init_site(self, params: Tensors) -> State:
        """Return the common start, from which the site goes on alone."""
        return {"private": params}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train alone and send when it is time; or, in the round after, judge mixtures."""
        if learner.round > self.trained(learner.rounds):
            return self.judge(learner, received["shared"]) if received else {}, state
        fitted = learner.fit(state.get("shared") or state["private"])
        sent = self.payload(fitted, received, learner.round, learner.rounds)
        return sent, sent or {"private": fitted}

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return the model in rounds that send it, and losses in the round after training."""
        if round_ > self.trained(rounds):
            return {"scores": {"loss": torch.zeros(len(GRID), dtype=torch.float64)}} if received else {}
        return {"shared": params} if self.when == "every" or round_ == self.trained(rounds) else {}

    def judge(self, learner: Learner, mean: Tensors) -> State:
        """Return the validation loss (len(GRID),) of each factor on the mean vector; nothing without such images."""
        if not len(learner.data.rows("val")):
            return {}
        losses = [learner.mean_loss(times(mean, factor), "val") for factor in GRID]
        learner.metrics["loss"] = min(losses)
        return {"scores": {"loss": torch.tensor(losses, dtype=torch.float64)}}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Keep what came, and mix anew."""
        came = {r.site: r for r in replies if r.state.get("shared")}
        scores = [(r.weight, r.state["scores"]) for r in replies if r.state.get("scores")]
        if not came and not scores:
            return server
        # Not the weights of the sites, which are 1 with federation.weights="equal".
        sizes = {site: torch.tensor(reply.metrics["examples"]).double() for site, reply in came.items()}
        kept = {KEPT + site: reply.state["shared"] for site, reply in came.items()}
        new = {**server, **kept, "images": {**server.get("images", {}), **sizes}}
        factor = GRID[int(weighted_mean(scores)["loss"].argmin())] if scores else 1.0
        return {**new, "shared": self.mixture(new, factor)}

    def mixture(self, server: State, factor: float = 1.0) -> dict[str, torch.Tensor]:
        """Return the combination of all kept vectors, times ``factor``; for an ensemble, all of them side by side."""
        models = [server[KEPT + site] for site in sorted(server["images"])]
        sizes = [float(size) for _, size in sorted(server["images"].items())]
        coefficients = [factor * c for c in shares(self.coefficients, sizes)]
        return stack(models) if self.predicts == "ensemble" else fuse(models, coefficients)

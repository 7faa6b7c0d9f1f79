"""IFCA: several models on the server; every site trains the one that fits its images best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from confrere.adapters.clusters import founders, redrawn
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Reply, one_of, register
from confrere.seeds import numpy_generator
from confrere.tensors import State, Tensors, weighted_mean

PAPER = "Ghosh et al., An Efficient Framework for Clustered Federated Learning, NeurIPS 2020, arXiv 2006.04088"
CLUSTER = "cluster."  # prefix of the groups that hold the models to choose from


@register("ifca", title="Clusters chosen by training loss (IFCA)", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class IFCA(Method):
    """Keep ``clusters`` models; a site trains the one of least training loss and says which; each is averaged alone.

    ``j_k = argmin_j F_k(w_j)``, ``w_j <- weighted mean of the trained w of those k with j_k = j`` (unchosen: as it
    was). A site predicts with the model it last chose, as the server now has it. Unseen sites have the mean of the
    clusters, each weighted by all sites that last chose it. So a site receives ``clusters + 1`` models.

    Args:
        clusters: how many models, >= 2.
        images: at most so many training images decide, at a pass a model, drawn anew in every round; 0: all.
        start: how they begin to differ. ``sites``: in round 1 all train the same model; then as many sites found one
            each with what they trained (sent to all as it is), the first the farthest from the mean, each next from
            those before. ``draw``: heads are drawn at random, and sites choose from round 1 on.

    Differences from the paper: it draws whole networks; draws of adapters (products of zero, a head of zeros) are one
    function, and among random heads all sites may prefer one for ever. Hence ``sites``, our reconstruction; with fewer
    sites in round 1, clusters start equal. Models are averaged, not gradients; AdamW is fresh in every round.
    """

    sends: ClassVar[tuple[str, ...]] = ("shared", "choice")
    also_sends: ClassVar[tuple[str, ...]] = ("number of its cluster",)
    also_keeps: ClassVar[tuple[str, ...]] = ("number of its cluster",)
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"clusters": ("choice", 2, 3, 4)}

    clusters: int = 2
    images: int = 64
    start: str = "sites"

    def __post_init__(self) -> None:
        one_of("method.start", self.start, ("sites", "draw"))
        if self.clusters < 2:
            raise ConfigError(f"{self.clusters} is too few", where="method.clusters", fix="use clusters >= 2")
        if self.images < 0:
            raise ConfigError(f"{self.images} is too few", where="method.images", fix="use images >= 0; 0 takes all")

    @property
    def needs(self) -> Literal["sum", "each"]:
        """The server sorts the models by cluster."""
        return "each"

    def init_server(self, params: Tensors) -> State:
        """Return one model, and with ``draw`` also the clusters, whose draws follow from the run's own."""
        drawn = self.clusters if self.start == "draw" else 0
        return {**super().init_server(params), **{f"{CLUSTER}{j}": redrawn(params, j) for j in range(drawn)}}

    def broadcast(self, server: State, site: str) -> State:
        """Return the mean model and all clusters there are."""
        return {g: t for g, t in server.items() if g == "shared" or g.startswith(CLUSTER)}

    def init_site(self, params: Tensors) -> State:
        """Return nothing: a site has not chosen yet."""
        return {}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the model of least training loss (ties: the first), or the common one before there are any."""
        models = [received[f"{CLUSTER}{j}"] for j in range(len(received) - 1)]
        if not models:
            return {"shared": learner.fit(received["shared"])}, {}
        judge = self.few(learner)
        chosen = min(range(len(models)), key=lambda j: judge.mean_loss(models[j], "train"))
        choice = {"cluster": torch.tensor([float(chosen)])}
        return {"shared": learner.fit(models[chosen]), "choice": choice}, {"choice": choice}

    def few(self, learner: Learner) -> Learner:
        """Return the learner with at most ``images`` of its training images, drawn at the round's address."""
        rows = learner.data.rows("train")
        order = numpy_generator(learner.seed, "choice", learner.round, learner.site).permutation(rows)
        return replace(learner, data=learner.data.trained_on(order[: self.images or len(order)]))

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return a model and, once there are clusters, a choice."""
        choice = {"choice": {"cluster": torch.zeros(1)}} if f"{CLUSTER}0" in received else {}
        return {**super().payload(params, received, round_, rounds), **choice}

    def plausible(self, payload: State) -> bool:
        """Return whether the choice is the number of a cluster."""
        return "choice" not in payload or float(payload["choice"]["cluster"]) in range(self.clusters)

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average every cluster over those who chose it; found the clusters first if there are none."""
        if f"{CLUSTER}0" not in server:
            averaged = super().aggregate(server, replies)
            models = founders([reply.state["shared"] for reply in replies], averaged["shared"], self.clusters)
            return {**averaged, **{f"{CLUSTER}{j}": model for j, model in enumerate(models)}}
        chosen = {r.site: int(r.state["choice"]["cluster"]) for r in replies}
        came = {r.site: torch.tensor([chosen[r.site], r.weight], dtype=torch.float64) for r in replies}
        new = {**server, "choices": {**server.get("choices", {}), **came}}  # of all sites, as (cluster, weight)
        for j in sorted(set(chosen.values())):
            new[f"{CLUSTER}{j}"] = weighted_mean((r.weight, r.state["shared"]) for r in replies if chosen[r.site] == j)
        last = [choice.tolist() for _, choice in sorted(new["choices"].items())]
        return {**new, "shared": weighted_mean([(weight, new[f"{CLUSTER}{int(j)}"]) for j, weight in last])}

    def personal(self, received: State, state: State) -> Tensors:
        """Return the cluster the site last chose, or the mean model."""
        return received[f"{CLUSTER}{int(state['choice']['cluster'])}" if "choice" in state else "shared"]

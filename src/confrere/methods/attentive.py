"""What FedAMP and FedACS have in common: every site gets a combination of all sites' models made for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from confrere.adapters.names import slot_of
from confrere.learner import Learner
from confrere.method import Method, Reply
from confrere.tensors import State, Tensors, sq_dist, weighted_mean

KEPT = "site."
"""Prefix of the server's groups that hold each site's last model."""


@dataclass(frozen=True, kw_only=True)
class Attentive(Method, ABC):
    """Keep each site's model w_i on the server and send site i the message ``u_i = sum_j a_ij w_j``.

    The site trains from ``u_i`` with the term ``pull/2 ||w - u_i||^2`` and predicts with its trained ``w_i``, of
    which it keeps a copy (under the name of what was sent: it is no secret). The weighted mean of all kept models,
    also of sites that missed this round, is sent, too: with it a site starts, and an unseen one predicts. So a site
    receives two models a round. Not registered: a base class.
    """

    also_keeps: ClassVar[tuple[str, ...]] = ("copy of the model it last sent, to predict with",)

    @property
    def needs(self) -> Literal["sum", "each"]:
        """The server compares the sites' models."""
        return "each"

    @abstractmethod
    def attention(self, server: State, models: Mapping[str, Tensors], site: str) -> dict[str, float]:
        """Return ``a_ij`` of ``site`` for every other site: none negative, their sum at most 1; a_ii is the rest."""

    @abstractmethod
    def pull(self) -> float:
        """Return the factor of ``1/2 ||w - u||^2`` in the local loss."""

    def broadcast(self, server: State, site: str) -> State:
        """Return the mean model and, once the site has sent its own, the message for it."""
        models = {g.removeprefix(KEPT): server[g] for g in sorted(server) if g.startswith(KEPT)}
        if site not in models:
            return {"shared": server["shared"]}
        weights = self.attention(server, models, site)
        weights[site] = max(0.0, 1.0 - sum(weights.values()))
        message = weighted_mean([(weights[name], model) for name, model in models.items() if weights[name] > 0])
        return {"shared": server["shared"], "message": message}

    def init_site(self, params: Tensors) -> State:
        """Return nothing: a site starts from the mean model."""
        return {}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train from the message, pulled back to it."""
        start = received.get("message") or received["shared"]
        # Constants; the gradient of the term reaches the trained tensors.
        anchor = {name: t.to(learner.backbone.device) for name, t in start.items()}
        fitted = learner.fit(start, penalty=lambda params, _: 0.5 * self.pull() * sq_dist(params, anchor))
        return {"shared": fitted}, {"shared": fitted}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Keep every site's model and weight, and the weighted mean of all that are kept."""
        came = [reply for reply in replies if reply.state.get("shared")]
        if not came:
            return server
        new = {**server, **{KEPT + reply.site: reply.state["shared"] for reply in came}}
        sizes = {reply.site: torch.tensor(reply.weight, dtype=torch.float64) for reply in came}
        new["weights"] = {**server.get("weights", {}), **sizes}
        mean = weighted_mean([(float(size), new[KEPT + site]) for site, size in sorted(new["weights"].items())])
        return {**new, "shared": mean}

    def personal(self, received: State, state: State) -> Tensors:
        """Return the model as the site last trained it, or the mean model before that."""
        return state.get("shared") or received["shared"]


def compared(tensors: Tensors, what: str) -> dict[str, Tensor]:
    """Return what decides on similarity: the ``adapters``, or ``all`` tensors, the head included.

    Sorted by name: the order of a sum decides its last bit, and a wire or a file may reorder names.
    """
    return {name: tensors[name] for name in sorted(tensors) if what == "all" or slot_of(name) is not None}

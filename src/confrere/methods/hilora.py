"""HiLoRA: a root adapter for all sites, one for each group of sites, and a leaf for each site, trained in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from confrere.adapters.algebra import named, pairs
from confrere.adapters.names import slot_of
from confrere.adapters.orthogonality import penalty
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import one_of, register
from confrere.methods.tiers import Tiers
from confrere.tensors import State, Tensors, pick
from confrere.tokenset import Batch


@register(
    "hilora",
    title="Root, cluster and leaf adapters (HiLoRA)",
    paper="Peng et al., HiLoRA: Hierarchical Low-Rank Adaptation for Personalized Federated Learning, CVPR 2026, "
    "arXiv 2603.02785",
)
@dataclass(frozen=True, kw_only=True)
class HiLoRA(Tiers):
    """Train one tier after the other: root over all sites, cluster over alike sites, leaf at each; lower tiers rest.

    ``y = W0 x + b + s (B_r A_r + B_c A_c + B_l A_l) x``; products are averaged, not factors (SVD back to the rank).
    Each tier is pushed from those before: ``L = L_task + gamma * sum over them of W-B(tier, lower)``. Before
    the second tier, sites are grouped by spectral clustering of ``||U_i^T U_j||_F^2 / r``, the U being column bases.

    Args:
        root, cluster: shares of the rounds for the first two tiers, > 0, together < 1; the leaf has the rest. Each
            tier has at least one round.
        clusters: number of groups; 0 finds it by the gap between eigenvalues.
        basis: U spans the site's last ``update`` of the root product, or its whole ``adapter``.
        gamma_cluster, gamma_leaf: weights of the terms, >= 0. normalise: cosines squared instead of raw sums.
        head: ``shared`` (trained with every tier, averaged as the tier is, the site's own from the leaf tier on) or
            ``local``.

    Differences from the paper: written from public notes; no code of its authors is public. Ours: shares of the
    rounds, the head, gamma, normalised terms, equal ranks (the budget divided by three), U of updates (whole adapters
    that started from one average are nearly equal). An unseen site has the root and the mean of the groups'
    adapters, without a leaf; so has, but for its leaf, a site that never trained a root and thus has no group.
    """

    slots: ClassVar[tuple[str, ...]] = ("root", "cluster", "leaf")
    own: ClassVar[tuple[str, ...]] = ("leaf",)
    also_keeps: ClassVar[tuple[str, ...]] = ("head of the leaf tier",)
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "clusters": ("choice", 0, 2, 3),
        "gamma_leaf": ("log", 1e-2, 1.0),
        "head": ("choice", "shared", "local"),
    }

    root: float = 0.4
    cluster: float = 0.3
    gamma_cluster: float = 0.1
    gamma_leaf: float = 0.1
    normalise: bool = True
    head: str = "shared"

    def __post_init__(self) -> None:
        one_of("method.head", self.head, ("shared", "local"))
        one_of("method.basis", self.basis, ("update", "adapter"))
        if not (self.root > 0 and self.cluster > 0 and self.root + self.cluster < 1):
            raise ConfigError("shares leave a tier no rounds", where="method.root", fix="root=0.4 cluster=0.3")
        if not (0 <= min(self.gamma_cluster, self.gamma_leaf) < float("inf")) or self.clusters < 0:
            raise ConfigError("gammas and clusters must not be negative", where="method", fix="clusters=2")

    def shared(self, name: str) -> bool:
        """Root and cluster factors are sent, each in its tier; leaves never; the head by policy."""
        return self.head == "shared" if name.startswith("head.") else slot_of(name) != "leaf"

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where a tier would have no round."""
        if rounds < 3:
            raise ConfigError(f"{rounds} rounds are too few for three tiers", where="rounds", fix="use rounds=3")

    def tier(self, round_: int, rounds: int) -> str:
        """Return which adapter is trained in a round; each has one or more of at least three rounds."""
        first = max(1, min(round(self.root * rounds), rounds - 2))
        second = first + max(1, min(round(self.cluster * rounds), rounds - 1 - first))
        return "root" if round_ <= first else "cluster" if round_ <= second else "leaf"

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the adapter of this round's tier and the head; what is below stays."""
        tier = self.tier(learner.round, learner.rounds)
        below = self.slots[: self.slots.index(tier)]
        gamma = {"root": 0.0, "cluster": self.gamma_cluster, "leaf": self.gamma_leaf}[tier]

        def term(params: Tensors, batch: Batch) -> Tensor:
            own = named(pairs(params, tier), "personal")  # the names that the penalty knows
            lower = [{**own, **named(pairs(params, slot), "general")} for slot in below]
            return gamma * torch.stack([penalty("W-B", two, normalise=self.normalise) for two in lower]).sum()

        state = {**state, "joined": {"round": torch.tensor([float(learner.round)])}}
        fitted = learner.fit(
            self.personal(received, state),
            train=lambda name: slot_of(name) in (tier, None),
            penalty=term if gamma > 0 else None,
        )
        kept = pick(fitted, lambda name: not self.shared(name) or (tier == "leaf" and slot_of(name) is None))
        return self.payload(fitted, received, learner.round, learner.rounds), {**state, "private": kept}

    def personal(self, received: State, state: State) -> Tensors:
        """Return all tiers; those of its group for a site that has trained, the shared ones for an unseen one."""
        group = received.get("group", {}) if "joined" in state else {}
        return {**received["shared"], **group, **received.get("tier", {}), **state["private"]}

    def may_stop(self, round_: int, rounds: int) -> bool:
        """Return whether the leaves are trained: judgements before say nothing of them."""
        return self.tier(round_, rounds) == "leaf"

"""FedALT: every site's own adapter beside the frozen mean of all others', weighed token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from confrere.adapters.algebra import named, pairs
from confrere.adapters.names import slot_of
from confrere.adapters.vectors import mixed, shares
from confrere.learner import Learner
from confrere.method import Method, Reply, one_of, register
from confrere.tensors import State, Tensors, pick, weighted_mean

KEPT = "site."
"""Prefix of the server's groups that hold each site's last adapter."""


@register(
    "fedalt",
    title="Own adapter + frozen rest of the world (FedALT)",
    paper="Bian et al., FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA, "
    "AAAI 2026, arXiv 2503.11880",
)
@dataclass(frozen=True, kw_only=True)
class FedALT(Method):
    """``y = W0 x + a_1 s B_k A_k x + a_2 s B_R A_R x`` with ``a = softmax(G_k x)`` for every token x.

    (A_k, B_k) is the site's own adapter, trained, sent to the server and never overwritten. (A_R, B_R) is the rest
    of the world: the mean of the last adapters of all other sites, received in each round and frozen. The mixer G_k
    (2, d_in) is trained and never sent. G_k = 0 at first: both count by half.

    Ranks: what a site trains has the whole budget, as in other methods; the rest of the world is only merged, so its
    slot is fixed: it has the budget's rank again (``factors``) or that of all other sites together (``products``).

    Args:
        rest: the mean is one of ``factors`` (of A and of B, as in the paper) or of ``products`` (exact, factored anew).
        head: ``shared`` (averaged) or ``local`` (never sent).

    Differences from the paper: written from public notes, no code is public. All sites' A start equal, without which
    a mean of factors means little. The head's place, a mean with equal weights, and prediction at an unseen site (the
    mean of all sites counts by half, as the head has seen it) are ours. AdamW is fresh in every round.
    """

    slots: ClassVar[tuple[str, ...]] = ("personal",)
    own: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ("rest",)
    gated: ClassVar[bool] = True
    search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "rest": ("choice", "factors", "products"),
        "head": ("choice", "shared", "local"),
    }

    rest: str = "factors"
    head: str = "shared"

    def __post_init__(self) -> None:
        one_of("method.rest", self.rest, ("factors", "products"))
        one_of("method.head", self.head, ("shared", "local"))

    @property
    def needs(self) -> Literal["sum", "each"]:
        """Every site gets the mean of the others."""
        return "each"

    def shared(self, name: str) -> bool:
        """Return whether a tensor is sent: the own adapter is, the mixer never, the head by policy."""
        return self.head == "shared" if name.startswith("head.") else slot_of(name) == "personal"

    def broadcast(self, server: State, site: str) -> State:
        """Return the head, and the mean of the adapters that all other sites sent last."""
        others = [server[group] for group in sorted(server) if group.startswith(KEPT) and group != KEPT + site]
        return {"shared": pick(server["shared"], is_head), **({"rest": self.mean(others)} if others else {})}

    def mean(self, adapters: Sequence[Tensors]) -> dict[str, torch.Tensor]:
        """Return the mean of adapters with equal weights, as the slot ``rest``."""
        if self.rest == "factors":
            return named(pairs(weighted_mean([(1.0, adapter) for adapter in adapters]), "personal"), "rest")
        return named(mixed(adapters, shares("mean", [1.0] * len(adapters)), "personal"), "rest")

    def init_site(self, params: Tensors) -> State:
        """Return the own adapter and, apart from it, what is never sent."""
        sent = pick(params, lambda n: slot_of(n) == "personal")
        return {"private": pick(params, lambda n: not self.shared(n)), "shared": sent}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the own adapter, the mixer and the head beside the frozen rest of the world."""
        fitted = learner.fit(self.personal(received, state), train=lambda n: slot_of(n) != "rest")
        mine = pick(fitted, lambda n: slot_of(n) != "rest")
        return {"shared": pick(mine, self.shared)}, self.init_site(mine)

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Keep every site's last adapter; average the head."""
        kept = {KEPT + r.site: pick(r.state["shared"], lambda n: not is_head(n)) for r in replies if r.state}
        return {**super().aggregate(server, replies), **kept}

    def personal(self, received: State, state: State) -> Tensors:
        """Return own adapter, mixer, head and the rest of the world (zero while no other site has sent anything)."""
        none = {
            layer: (torch.zeros_like(a), torch.zeros_like(b))
            for layer, (a, b) in pairs(state["shared"], "personal").items()
        }
        rest = received.get("rest") or named(none, "rest")
        return {**pick(received.get("shared", {}), is_head), **state["private"], **state["shared"], **rest}


def is_head(name: str) -> bool:
    """Return whether a tensor is the head's."""
    return name.startswith("head.")

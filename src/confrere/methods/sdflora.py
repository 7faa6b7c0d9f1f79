"""SDFLoRA: a general adapter averaged as a product, whatever its rank at each site, and a personal one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from confrere.adapters.algebra import Pair, average_products, cut, named, pairs
from confrere.adapters.names import slot_of
from confrere.adapters.ranks import rank_of
from confrere.method import Method, Reply, one_of, register, sent_by
from confrere.methods.flexlora import filled
from confrere.tensors import State, Tensors, pick, weighted_mean


@register(
    "sdflora",
    title="General (stacked, SVD) + personal (SDFLoRA)",
    paper="Shen et al., SDFLoRA: Selective Dual-Module LoRA for Federated Fine-tuning with Heterogeneous Clients, "
    "2026, arXiv 2601.11219",
)
@dataclass(frozen=True, kw_only=True)
class SDFLoRA(Method):
    """Train a general and a personal adapter together; stack the general ones and compress the stack again.

    Stacked, the general pairs are one pair of product ``sum_k p_k B_k A_k``, exactly, whatever their ranks; its SVD
    gives the server's pair of the largest rank, sorted by singular value. A site takes its first directions: the best
    fit of its own rank, and its part of the next stack is its pair beside the server's other directions: it did not
    see them, so it does not vote them away. Personal factors never leave.

    Args:
        head: ``shared`` (averaged with the general adapter) or ``local`` (stays at the site).

    Differences from the paper: written from its abstract and summaries; joint steps, equal ranks of the two modules
    the head's place and what becomes of directions beyond a site's rank are our reconstruction. The paper's noise on
    the global module (differential privacy) is not part of this class.
    """

    slots: ClassVar[tuple[str, ...]] = ("general", "personal")
    unequal: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"head": ("choice", "shared", "local")}

    head: str = "shared"

    def __post_init__(self) -> None:
        one_of("method.head", self.head, ("shared", "local"))

    @property
    def needs(self) -> Literal["sum", "each"]:
        """A stack holds each site's factors."""
        return "each"

    def shared(self, name: str) -> bool:
        """General factors are sent, personal ones never; the head by policy."""
        return self.head == "shared" if name.startswith("head.") else slot_of(name) == "general"

    def init_site(self, params: Tensors) -> State:
        """Return the personal tensors, and the rank the site's general adapter has."""
        return {**super().init_site(params), "rank": {"general": torch.tensor(rank_of(params))}}

    def personal(self, received: State, state: State) -> Tensors:
        """Return the general adapter cut to the site's rank, with what is the site's own."""
        return {**cut(received["shared"], int(state["rank"]["general"])), **state["private"]}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Stack and compress the general factors; average the head if it was sent."""
        sent = sent_by(replies)
        if not sent:
            return server
        old = pairs(server["shared"], "general")
        rank = rank_of(server["shared"])
        whole = [(weight, filled(tensors, server["shared"])) for weight, tensors in sent]
        new = pairs(average_products(whole, "general", rank), "general")
        general = named({layer: alive(pair, old[layer]) for layer, pair in new.items()}, "general")
        head = weighted_mean([(weight, pick(tensors, lambda name: slot_of(name) is None)) for weight, tensors in sent])
        return {**server, "shared": {**general, **head}}


def alive(new: Pair, old: Pair) -> Pair:
    """Return ``new`` with the rows of ``old``'s A where a direction is empty, and zeros in B.

    Such a direction (before any B has moved, or when the stack's rank is small) would be zero in A and B alike, which
    no gradient ever leaves. The product stays what it was, to rounding.
    """
    a, b = new
    size = b.norm(dim=0)
    empty = size <= 1e-4 * size.max()  # roots of singular values: 1e-8 of the largest
    return torch.where(empty[:, None], old[0], a), torch.where(empty, 0.0, b)

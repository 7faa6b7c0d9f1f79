"""FlexLoRA: the mean of products, factored again by SVD to each site's own rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from confrere.adapters.algebra import Pair, average_products, cut, named, pairs
from confrere.adapters.names import side_of, slot_of
from confrere.adapters.ranks import rank_of
from confrere.method import Method, Reply, one_of, register
from confrere.tensors import State, Tensors, pick, weighted_mean


@register(
    "flexlora",
    title="SVD of the mean product (FlexLoRA)",
    paper="Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, "
    "NeurIPS 2024, arXiv 2402.11505",
)
@dataclass(frozen=True, kw_only=True)
class FlexLoRA(Method):
    """Average the products: ``U S V^T = SVD(sum_k p_k B_k A_k)``, then ``B = U sqrt(S)``, ``A = sqrt(S) V^T``.

    Site k gets the first r_k rows of A and columns of B, which are the best pair of its rank. The server keeps
    the largest rank, and the rank of each site's last reply, so that a site is sent only what it can hold.

    A site of small rank returns W cut to r_k, and the mean takes the cut for its opinion: what only large sites learnt
    shrinks by their weight in every round, even at learning rate 0. ``rest = "keep"`` puts the server's own directions
    beyond r_k beside the site's pair (``concat``, exact), so that a model that nobody changes stands still.

    Args:
        rest: of W beyond a site's rank in its part of the mean: ``drop`` (zero, the paper) or ``keep`` (the server's).

    Differences from the paper: the singular values are shared equally by both factors; a direction that carries
    nothing (singular value at rounding level) keeps its last row of A beside a zero column of B, because two zeros
    never leave zero; a head beside the adapters, averaged; local steps, a fresh optimiser in every round.
    """

    unequal: ClassVar[bool] = True

    rest: str = "drop"

    def __post_init__(self) -> None:
        one_of("method.rest", self.rest, ("drop", "keep"))

    @property
    def needs(self) -> Literal["sum", "each"]:
        """The server multiplies each site's own factors."""
        return "each"

    def broadcast(self, server: State, site: str) -> State:
        """Send as many rows and columns as the site's last reply had; all of them before its first."""
        known = server.get("ranks", {}).get(site)
        return {"shared": server["shared"] if known is None else cut(server["shared"], int(known))}

    def init_site(self, params: Tensors) -> State:
        """Keep the site's rank alone."""
        return {"private": {"rank": torch.tensor(rank_of(params))}}

    def personal(self, received: State, state: State) -> Tensors:
        """Return what was received, cut to the site's rank."""
        return cut(received["shared"], int(state["private"]["rank"]))

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Merge the adapters, average the head, remember the ranks."""
        replies = [reply for reply in replies if reply.state.get("shared")]
        if not replies:
            return server
        sent = [(reply.weight, reply.state["shared"]) for reply in replies]
        rest = weighted_mean([(weight, pick(tensors, lambda n: slot_of(n) is None)) for weight, tensors in sent])
        ranks = {reply.site: torch.tensor(rank_of(reply.state["shared"])) for reply in replies}
        return {
            **server,
            "shared": {**rest, **self.merge(server["shared"], sent)},
            "ranks": {**server.get("ranks", {}), **ranks},
        }

    def merge(self, before: Tensors, sent: Sequence[tuple[float, Tensors]]) -> dict[str, Tensor]:
        """Return the adapter of the server's rank that is nearest to the mean of the products."""
        last = pairs(before, "general")
        if self.rest == "keep":
            sent = [(weight, filled(tensors, before)) for weight, tensors in sent]
        merged = pairs(average_products(sent, "general", rank_of(before)), "general")
        return named({layer: revive(pair, last[layer]) for layer, pair in merged.items()}, "general")


def filled(adapter: Tensors, server: Tensors) -> dict[str, Tensor]:
    """Return an adapter with the server's rows of A and columns of B beyond its own rank; other tensors are left out.

    The product is ``B_k A_k + (what the server knew and the site could not hold)``.
    """
    sides = {name: side_of(name) for name in adapter}
    return {
        n: torch.cat([t, server[n][len(t) :]]) if sides[n] == "A" else torch.cat([t, server[n][:, t.shape[1] :]], dim=1)
        for n, t in adapter.items()
        if sides[n] is not None
    }


def revive(pair: Pair, last: Pair) -> Pair:
    """Return a balanced pair whose empty directions have the row of A they had in ``last``; the same product."""
    a, b = pair
    values = a.norm(dim=1) * b.norm(dim=0)  # the singular values
    empty = values <= 1e-6 * values.max()
    return torch.where(empty[:, None], last[0], a), torch.where(empty, 0.0, b)

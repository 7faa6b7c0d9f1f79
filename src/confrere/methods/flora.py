"""FLoRA: stacked factors, merged into the frozen weight; adapters begin anew in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from confrere.adapters import lora, residual
from confrere.adapters.names import layer_of, slot_of
from confrere.adapters.ranks import rank_of
from confrere.learner import Learner
from confrere.method import Reply, register, sent_by
from confrere.methods.merging import Merging
from confrere.seeds import torch_generator
from confrere.tensors import State, Tensors, pick, weighted_mean


@register(
    "flora",
    title="Stacked and merged (FLoRA)",
    paper="Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, "
    "NeurIPS 2024, arXiv 2409.05976",
)
@dataclass(frozen=True, kw_only=True)
class FLoRA(Merging):
    """Stack the factors, ``A = [A_1; ...; A_K]`` and ``B = [p_1 B_1, ..., p_K B_K]``: BA is the exact mean of products.

    The server adds it to R, and a site computes with ``W0 + scale R`` (slot ``residual``). Each round begins with
    new adapters: A drawn at an address of seed and round, the same for all sites of one rank, and B = 0.

    Differences from the paper: the server sends R, (d_out, d_in) a layer, instead of the round's stack of rank
    sum r_k. That is more bytes where sum r_k < d_in d_out / (d_in + d_out), but a site that missed rounds is right
    at once. p_k is on B, not on A: the same product. While training, LoRA's dropout of the layer's input reaches R
    too. A head beside the adapters, averaged; local steps, a fresh optimiser in every round.
    """

    unequal: ClassVar[bool] = True

    def init_server(self, params: Tensors) -> State:
        """Hold the head and R = 0; adapters have no memory."""
        return {"shared": {**pick(params, lambda n: slot_of(n) is None), **residual.zero(params)}}

    def init_site(self, params: Tensors) -> State:
        """Keep the site's rank alone."""
        return {"private": {"rank": torch.tensor(rank_of(params))}}

    def personal(self, received: State, state: State) -> Tensors:
        """Return head, R, and the adapter: the trained one, or one of zeros once it has been merged."""
        merged = received[residual.SLOT]
        nothing = {n: torch.zeros(shape) for n, shape in shapes(merged, int(state["private"]["rank"])).items()}
        return {**nothing, **received["shared"], **residual.complete(merged)}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train an adapter that begins anew, beside the frozen R."""
        generator = torch_generator(learner.seed, "init", "general", learner.round)
        begun = lora.init(shapes(received[residual.SLOT], int(state["private"]["rank"])), generator)
        fitted = learner.fit({**self.personal(received, state), **begun}, train=self.shared)
        return {"shared": pick(fitted, self.shared)}, state

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Add the product of the stacks to R, average the head."""
        sent = sent_by(replies)
        if not sent:
            return server
        rest = weighted_mean([(weight, pick(tensors, lambda n: slot_of(n) is None)) for weight, tensors in sent])
        return {**server, "shared": {**rest, **residual.add(server["shared"], residual.mean_products(sent))}}


def shapes(merged: Tensors, rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of adapters of ``rank`` for the layers of R."""
    sizes = {str(layer_of(n)): (t.shape[1], t.shape[0]) for n, t in merged.items()}
    return lora.shapes(sizes, {"general": rank})

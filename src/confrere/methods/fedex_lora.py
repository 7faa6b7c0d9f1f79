"""FedEx-LoRA: averaged factors, and what averaging them loses added to the frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from confrere.adapters import residual
from confrere.adapters.algebra import pairs
from confrere.learner import Learner
from confrere.method import Reply, register, sent_by
from confrere.methods.merging import Merging
from confrere.tensors import State, Tensors, pick


@register(
    "fedex-lora",
    title="Averaged factors + residual (FedEx-LoRA)",
    paper="Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language "
    "Models, ACL 2025, arXiv 2410.09432",
)
@dataclass(frozen=True, kw_only=True)
class FedExLoRA(Merging):
    """Average A and B, and add ``mean(B A) - mean(B) mean(A)`` to R, so that the model is that of the exact mean.

    A site computes with ``W0 + scale (R + B A)``: R is a slot beside the adapter, so the scale (alpha / r) counts
    once for both. Means are weighted by the sites' weights.

    Differences from the paper: R is kept beside W0 and sent whole in every round, (d_out, d_in) a layer, so that a
    site that missed rounds is right; the paper sends each round's residual, of rank up to K r. While training, LoRA's
    dropout of the layer's input reaches R too. A head beside the adapters, averaged; local steps, a fresh optimiser
    in every round.
    """

    def init_server(self, params: Tensors) -> State:
        """Hold the first adapter and head, and R = 0."""
        return {"shared": {**params, **residual.zero(params)}}

    def personal(self, received: State, state: State) -> Tensors:
        """Return adapter and head, and R as a slot."""
        return {**received["shared"], **residual.complete(received[residual.SLOT])}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train adapter and head beside the frozen R."""
        fitted = learner.fit(self.personal(received, state), train=self.shared)
        return {"shared": pick(fitted, self.shared)}, state

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average the factors and the head; add to R what the factors' mean lacks."""
        sent = sent_by(replies)
        if not sent:
            return server
        mean = super().aggregate(server, replies)["shared"]
        exact, averaged = residual.mean_products(sent), pairs(mean, "general")
        lost = {layer: exact[layer] - b.double() @ a.double() for layer, (a, b) in averaged.items()}
        return {**server, "shared": {**mean, **residual.add(server["shared"], lost)}}

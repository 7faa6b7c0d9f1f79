"""LoRA-FAIR: averaged factors, with B corrected so that the product is near the mean of products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from confrere.adapters.algebra import Pair, concat, named, pairs
from confrere.errors import ConfigError
from confrere.method import Method, Reply, register, sent_by
from confrere.tensors import State


@register(
    "lora-fair",
    title="Corrected mean of B (LoRA-FAIR)",
    paper="Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, "
    "ICCV 2025, arXiv 2411.14961",
)
@dataclass(frozen=True, kw_only=True)
class LoRAFair(Method):
    """Average A and B, then correct B: the server sends A and B + dB.

    With ``A, B`` the means, dB minimises ``||mean(B A) - (B + dB) A||_F^2 + lam t ||dB||_F^2`` in every layer, where
    ``t = ||A||_F^2 / r``: ``dB = E A^T (A A^T + lam t I)^-1`` with ``E = mean(B A) - B A``.

    Args:
        lam: weight of the ridge, >= 0, without unit (t is the mean of the diagonal of A A^T). Large values leave
            the mean of B (FedIT); 0 projects the mean of products on the rows of A.

    Differences from the paper: the paper minimises a dissimilarity of the two products (a cosine) plus a norm of dB
    by SGD on the server. Ours is least squares, which sees direction and length, with a ridge and in closed form:
    no step size or count. So lam is not comparable with the paper's, though its default, 0.01, is the same number.
    A head beside the adapters, averaged; local steps, a fresh optimiser in every round.
    """

    search: ClassVar[dict[str, tuple[Any, ...]]] = {"lam": ("log", 1e-4, 1.0)}

    lam: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.lam < float("inf"):
            raise ConfigError(f"{self.lam} is out of range", where="method.lam", fix="use lam >= 0, e.g. 0.01")

    @property
    def needs(self) -> Literal["sum", "each"]:
        """The server multiplies each site's own factors."""
        return "each"

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average factors and head, then correct B."""
        sent = sent_by(replies)
        if not sent:
            return server
        mean = super().aggregate(server, replies)["shared"]
        total = sum(weight for weight, _ in sent)
        weights = [weight / total for weight, _ in sent]
        factors = [pairs(tensors, "general") for _, tensors in sent]
        corrected = {
            layer: correct(pair, concat([f[layer] for f in factors], weights), self.lam)
            for layer, pair in pairs(mean, "general").items()
        }
        return {**server, "shared": {**mean, **named(corrected, "general")}}


def correct(mean: Pair, stack: Pair, lam: float) -> Pair:
    """Return ``(A, B + dB)`` of the averaged pair, given the stack whose product is the mean of products."""
    (a, b), (stacked_a, stacked_b) = ((x.double(), y.double()) for x, y in (mean, stack))
    gram = a @ a.T
    error = stacked_b @ (stacked_a @ a.T) - b @ gram
    ridge = lam * gram.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)
    change = error @ torch.linalg.pinv(gram + ridge, hermitian=True)
    return mean[0], (b + change).to(mean[1])

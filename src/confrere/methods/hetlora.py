"""HetLoRA: unequal ranks by zero-padding and truncation, weighted by how much each site says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from confrere.adapters.algebra import cut, norm, pairs
from confrere.adapters.names import side_of
from confrere.adapters.ranks import rank_of
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import one_of, register
from confrere.methods.flexlora import FlexLoRA, filled
from confrere.tensors import State, Tensors, pick, weighted_mean


@register(
    "hetlora",
    title="Zero-padding and self-pruning (HetLoRA)",
    paper="Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, "
    "arXiv 2401.06432",
)
@dataclass(frozen=True, kw_only=True)
class HetLoRA(FlexLoRA):
    """Average factors that are padded with zeros to one rank; site k gets the first r_k rows and columns.

    Weights of the adapters are ``||dW_k||_F / sum_j ||dW_j||_F`` with ``dW_k = B_k A_k`` over all layers. With
    ``gamma`` < 1 a site adds ``lam * mean over layers of ||B_k[:, c:]||_F ||A_k[c:]||_F`` to its loss, where
    ``c = floor(gamma r_k)``, and goes on with rank c for good once a round has made that tail smaller.

    Zeros of a small site count in the mean, in A and in B: what only large sites learnt shrinks by the square of their
    weight in every round, even at learning rate 0. ``rest = "keep"`` pads with the server's own factors instead.

    Args:
        rest: what pads a small site's factors: ``drop`` (zeros, the paper) or ``keep`` (the server's own).
        weighting: ``norm`` (the paper's sparsity weights) or ``images`` (the sites' own weights).
        gamma: share of the rank that survives a pruning, in (0, 1]; 1 never prunes.
        lam: weight of the tail, >= 0; without effect at ``gamma`` 1.
        least: no site prunes below this rank, >= 1.

    Differences from the paper: pruning is off by default; the head is averaged by the sites' weights; the tail is
    a mean over layers and one decision a site, as a site has one rank; directions that no reply reaches stay as
    they were. Reconstructed: one norm over all layers, the rounding of ``gamma r``, defaults of lam and least.
    """

    search: ClassVar[dict[str, tuple[Any, ...]]] = {"gamma": ("choice", 1.0, 0.75, 0.5)}

    weighting: str = "norm"
    gamma: float = 1.0
    lam: float = 0.005
    least: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method.weighting", self.weighting, ("norm", "images"))
        if not 0.0 < self.gamma <= 1.0:
            raise ConfigError(f"{self.gamma} is out of range", where="method.gamma", fix="use 0 < gamma <= 1")
        if not 0.0 <= self.lam < float("inf") or self.least < 1:
            raise ConfigError("lam >= 0 and least >= 1 are needed", where="method", fix="lam=0.005 least=1")

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train, and prune where pruning is on and the tail has become smaller."""
        start = self.personal(received, state)
        rank = rank_of(start)
        kept = min(rank, max(self.least, int(self.gamma * rank)))
        if kept == rank:
            return self.split(learner.fit(start))
        fitted = learner.fit(start, penalty=lambda params, batch: self.lam * tail(params, kept))
        return self.split(cut(fitted, kept) if tail(fitted, kept) < tail(start, kept) else fitted)

    def merge(self, before: Tensors, sent: Sequence[tuple[float, Tensors]]) -> dict[str, Tensor]:
        """Return the weighted mean of the padded factors, with the server's own where no reply reaches."""
        adapters = [(weight, pick(tensors, lambda n: side_of(n) is not None)) for weight, tensors in sent]
        if self.weighting == "norm":
            sizes = [size(tensors) for _, tensors in adapters]
            if sum(sizes) > 0:  # before any B has moved all are zero
                adapters = [(own, tensors) for own, (_, tensors) in zip(sizes, adapters, strict=True)]
        reach = max(rank_of(tensors) for _, tensors in adapters)
        keep = self.rest == "keep"
        full = [(weight, filled(t, before) if keep else padded(t, reach)) for weight, t in adapters]
        return filled(weighted_mean(full), before)


def padded(adapter: Tensors, rank: int) -> dict[str, Tensor]:
    """Return an adapter with zero rows of A and zero columns of B up to ``rank``."""
    return {
        n: pad(t, (0, 0, 0, rank - len(t)) if side_of(n) == "A" else (0, rank - t.shape[1])) for n, t in adapter.items()
    }


def size(adapter: Tensors) -> float:
    """Return ``||B A||_F`` over all layers."""
    return float(sum(float(norm(pair)) ** 2 for pair in pairs(adapter, "general").values()) ** 0.5)


def tail(params: Tensors, kept: int) -> Tensor:
    """Return the mean over layers of ``||B[:, kept:]||_F ||A[kept:]||_F``, a scalar with gradient."""
    return torch.stack([b[:, kept:].norm() * a[kept:].norm() for a, b in pairs(params, "general").values()]).mean()

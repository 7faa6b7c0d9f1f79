"""FedAMP: sites whose models are near each other pull each other, near ones more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from confrere.errors import ConfigError
from confrere.method import one_of, register
from confrere.methods.attentive import Attentive, compared
from confrere.tensors import State, Tensors, sq_dist


@register(
    "fedamp",
    title="Attentive messages between near models (FedAMP)",
    paper="Huang et al., Personalized Cross-Silo Federated Learning on Non-IID Data, AAAI 2021, arXiv 2007.03797",
)
@dataclass(frozen=True, kw_only=True)
class FedAMP(Attentive):
    """Send site i ``u_i = a_ii w_i + sum_j a_ij w_j`` with ``a_ij = alpha exp(-||w_i - w_j||^2 / sigma) / sigma``.

    ``a_ii = 1 - sum_j a_ij``. The site minimises ``F_i(w) + lam / (2 alpha) ||w - u_i||^2`` from ``u_i``. Where
    the sum over j would exceed ``(K - 1) / K`` for K sites, all a_ij are scaled down to it: the combination stays
    convex, and the closest cooperation is the plain mean of all sites.

    Args:
        alpha: step size of the messages, > 0.
        sigma: width of the kernel, > 0.
        relative: measure squared distances in units of their mean over all pairs of sites, so that ``sigma`` suits
            any backbone; False takes them as they are, as the paper does.
        lam: strength of the coupling, >= 0.
        compared: what the distance is over: ``adapters`` or ``all`` (the head, too).

    Differences from the paper: adapters and head instead of whole networks; the local problem is not solved but
    approached by a round's steps; the limit on the sum, relative distances and all defaults are ours. A site
    predicts with ``w_i`` as it last trained it, not with ``u_i``. An unseen site has the weighted mean of
    all sites' last models.
    """

    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "alpha": ("log", 0.05, 2.0),
        "sigma": ("log", 0.1, 10.0),
        "lam": ("log", 1e-3, 1.0),
    }

    alpha: float = 0.5
    sigma: float = 1.0
    relative: bool = True
    lam: float = 0.1
    compared: str = "adapters"

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            if not (0.0 < getattr(self, name) < float("inf")):
                raise ConfigError(f"{name} must be positive", where=f"method.{name}", fix=f"use {name}=1.0")
        if not (0.0 <= self.lam < float("inf")):
            raise ConfigError(f"{self.lam} is out of range", where="method.lam", fix="use lam >= 0")
        one_of("method.compared", self.compared, ("adapters", "all"))

    def pull(self) -> float:
        """Return ``lam / alpha``."""
        return self.lam / self.alpha

    def attention(self, server: State, models: Mapping[str, Tensors], site: str) -> dict[str, float]:
        """Return ``a_ij`` of ``site`` by the distances between the models."""
        looked = {name: compared(model, self.compared) for name, model in models.items()}
        others = [name for name in looked if name != site]
        unit = 1.0
        if self.relative:
            # FedAMP needs the distance of all pairs only to have a unit; K^2 d multiplications a message.
            distances = [float(sq_dist(looked[a], looked[b])) for a, b in combinations(looked, 2)]
            unit = sum(distances) / max(1, len(distances)) or 1.0
        weights = {
            name: self.alpha / self.sigma * math.exp(-float(sq_dist(looked[site], looked[name])) / unit / self.sigma)
            for name in others
        }
        limit = len(others) / len(looked)
        excess = max(1.0, sum(weights.values()) / limit) if others else 1.0
        return {name: weight / excess for name, weight in weights.items()}

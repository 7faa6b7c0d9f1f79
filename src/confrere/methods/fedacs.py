"""FedACS: attention by cosine similarity, to those sites only that pass a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from confrere.errors import ConfigError
from confrere.method import Reply, one_of, register
from confrere.methods.attentive import Attentive, compared
from confrere.tensors import State, Tensors, dot, sub

THRESHOLDS = ("mean", "fixed", "quantile", "rising", "none")


@register(
    "fedacs",
    title="Cosine attention with a dynamic threshold (FedACS)",
    paper="Chen et al., Personalized Federated Learning with Attention-Based Client Selection, ICASSP 2024, "
    "arXiv 2312.15148",
)
@dataclass(frozen=True, kw_only=True)
class FedACS(Attentive):
    """Send site i ``u_i = a_ii w_i + sum_j a_ij w_j`` over the sites j whose similarity ``s_ij`` to it is enough.

    ``s_ij = cos(x_i, x_j)``, ``N_i = {j : s_ij >= delta_i}`` and, with ``s_ij`` cut off at 0,
    ``a_ij = step s_ij / (1 + sum over N_i of s_ij)``, ``a_ii = 1 - sum_j a_ij``. The site minimises
    ``F_i(w) + lam / (2 step) ||w - u_i||^2`` from ``u_i``.

    Args:
        threshold: delta_i: ``mean`` of s_i. over the others; ``fixed`` at ``delta``; ``quantile`` of s_i.;
            ``rising`` from quantile 0 towards ``quantile``, half of the way every ``halflife`` rounds; ``none``, the
            negative control: with ``similarity="weights"``, whose cosines are all near 1, it is FedAvg.
        delta: of ``fixed``, in [-1, 1]. quantile: in [0, 1]. halflife: rounds, >= 1.
        similarity: x is the ``weights`` or the ``updates``, i.e. weights less those all sites began with.
        compared: the names in x: ``adapters``, or ``all`` (the head, too).
        step: how far a site moves towards its peers, in (0, 1]; 1 gives their s-weighted mean, itself included.
        lam: strength of the coupling, >= 0.

    Differences from the paper: no code is public; the selection and the coupling are the paper's, the two-step scheme
    is FedAMP's with s in place of its kernel (our reconstruction), as are the schedules of the threshold, the
    normalisation that keeps the sum of a_ij below 1, and all defaults. Adapters and head instead of whole networks.
    A site predicts with ``w_i`` as it last trained it, not with ``u_i``. An unseen site has the weighted mean of
    all sites' last models.
    """

    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "threshold": ("choice", "mean", "quantile", "rising"),
        "similarity": ("choice", "weights", "updates"),
        "lam": ("log", 1e-3, 1.0),
    }

    threshold: str = "mean"
    delta: float = 0.5
    quantile: float = 0.5
    halflife: int = 5
    similarity: str = "weights"
    compared: str = "adapters"
    step: float = 1.0
    lam: float = 0.1

    def __post_init__(self) -> None:
        one_of("method.threshold", self.threshold, THRESHOLDS)
        one_of("method.similarity", self.similarity, ("weights", "updates"))
        one_of("method.compared", self.compared, ("adapters", "all"))
        if not (-1.0 <= self.delta <= 1.0 and 0.0 <= self.quantile <= 1.0 and 0.0 < self.step <= 1.0):
            raise ConfigError("delta, quantile or step is out of range", where="method", fix="quantile=0.5 step=1.0")
        if not (0.0 <= self.lam < float("inf")) or self.halflife < 1:
            raise ConfigError("lam or halflife is out of range", where="method", fix="lam=0.1 halflife=5")

    def pull(self) -> float:
        """Return ``lam / step``."""
        return self.lam / self.step

    def init_server(self, params: Tensors) -> State:
        """Return what all begin with, twice: one stays as it is, to take updates from."""
        start = compared(params, self.compared) if self.similarity == "updates" else {}
        return {**super().init_server(params), "start": start, "clock": {"round": torch.zeros(1)}}

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Keep the models and the number of the round, which a rising threshold goes by."""
        return {**super().aggregate(server, replies), "clock": {"round": torch.tensor([float(replies[0].round)])}}

    def attention(self, server: State, models: Mapping[str, Tensors], site: str) -> dict[str, float]:
        """Return ``a_ij`` of ``site``."""
        looked = {name: self._looked(model, server.get("start", {})) for name, model in models.items()}
        similar = {name: cosine(looked[site], other) for name, other in looked.items() if name != site}
        if not similar:
            return {}
        least = self.least(list(similar.values()), float(server["clock"]["round"]))
        # A hair below: equal similarities must pass their own mean whatever its last bit.
        chosen = {name: max(0.0, s) if s >= least - 1e-9 else 0.0 for name, s in similar.items()}
        whole = 1.0 + sum(chosen.values())
        return {name: self.step * s / whole for name, s in chosen.items()}

    def least(self, row: Sequence[float], round_: float) -> float:
        """Return the threshold of a site, given its similarities to the others."""
        if self.threshold in ("none", "fixed"):
            return self.delta if self.threshold == "fixed" else -1.0
        if self.threshold == "mean":
            return sum(row) / len(row)
        risen = 1.0 if self.threshold == "quantile" else 1.0 - 0.5 ** (round_ / self.halflife)
        return float(torch.tensor(row, dtype=torch.float64).quantile(self.quantile * risen))

    def _looked(self, model: Tensors, start: Tensors) -> Tensors:
        chosen = compared(model, self.compared)
        return sub(chosen, start) if self.similarity == "updates" else chosen


def cosine(left: Tensors, right: Tensors) -> float:
    """Return the cosine over all names; 0 when one side is zero."""
    size = float(dot(left, left) * dot(right, right)) ** 0.5
    return float(dot(left, right)) / size if size > 0 else 0.0

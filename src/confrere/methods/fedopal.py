"""FedOPAL: a general and a personal adapter, trained together and kept orthogonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from confrere.adapters.algebra import average_products, named, pairs
from confrere.adapters.orthogonality import REGULARISERS, ROUTES, penalty
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Reply, one_of, register
from confrere.methods.turns import Turns, in_turn
from confrere.tensors import State, Tensors
from confrere.tokenset import Batch


@register(
    "fedopal",
    title="FedOPAL (general + personal, orthogonal)",
    paper="Tupper and Gagné, Personalized Federated Fine-Tuning of Vision Foundation Models for Healthcare, "
    "SMASH 2025, arXiv 2510.12741",
)
@dataclass(frozen=True, kw_only=True)
class FedOPAL(Turns):
    """Train general (averaged) and personal (never sent) LoRA factors in one step, with a penalty on overlap.

    For an adapted layer of site k, with a scale s:  ``y = W0 x + b + s B_g A_g x + s B_k A_k x``  and
    ``L_k = L_task + lam * mean over layers of Omega``.

    Args:
        lam: weight of the orthogonality term, >= 0.
        regulariser: Omega, one of ``W-A1 W-A2 W-B W-D R-cos R-feat none`` (``confrere.adapters.orthogonality``).
        routing: which side the term shapes: ``both``, ``personal_only`` or ``general_only``.
        head: ``shared`` (averaged with the general adapter) or ``local`` (stays at the site).
        aggregation: of the general factors: ``factor`` (mean of A and of B), ``ffa`` (A frozen and common, then
            the mean is exact) or ``svd`` (mean of the products B A, re-factored to the same rank).
        warmup: rounds before the term is switched on, >= 0: cosines say nothing while B is near zero.
        normalise: scale-free forms of the weight terms (cosines, mean over entries); False gives the raw sums.
        training: ``joint``, or ``in-turn``: general adapter and head alone for half of the steps, then the personal
            adapter, with the term. Where sites hide their images only the first half needs noise.

    Differences from the paper: it has no public code, and gives neither formula nor weight of the penalty, nor ranks,
    layers, head policy or backbone: our reconstruction. The paper's: two adapters a site, one averaged and one
    personal, trained simultaneously, with an orthogonality regulariser. Optimiser states are fresh in every round.
    """

    slots: ClassVar[tuple[str, ...]] = ("general", "personal")
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lam": ("log", 0.05, 5.0), "head": ("choice", "shared", "local")}

    lam: float = 0.5
    regulariser: str = "W-B"
    routing: str = "both"
    head: str = "shared"
    aggregation: str = "factor"
    warmup: int = 1
    normalise: bool = True

    def __post_init__(self) -> None:
        one_of("method.regulariser", self.regulariser, REGULARISERS)
        one_of("method.routing", self.routing, ROUTES)
        one_of("method.head", self.head, ("shared", "local"))
        one_of("method.aggregation", self.aggregation, ("factor", "ffa", "svd"))
        super().__post_init__()
        if not (0.0 <= self.lam < float("inf")) or self.warmup < 0:
            raise ConfigError("lam and warmup must not be negative", where="method", fix="lam=0.5 warmup=1")

    @property
    def needs(self) -> Literal["sum", "each"]:
        """The mean of products needs each site's factors; the other aggregations only a weighted sum."""
        return "each" if self.aggregation == "svd" else "sum"

    def shared(self, name: str) -> bool:
        """General factors are sent, personal ones never; the head by policy."""
        return self.head == "shared" if name.startswith("head.") else ".general." in name

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Take every local step on general, personal and head tensors together, or in turn."""
        active = self.regulariser != "none" and self.lam > 0 and learner.round > self.warmup

        def term(params: Tensors, batch: Batch) -> Tensor:
            return self.lam * penalty(
                self.regulariser,
                params,
                routing=self.routing,
                normalise=self.normalise,
                inputs=batch.inputs,
                features=lambda alone: learner.features(alone, batch),
            )

        fit = partial(in_turn, learner) if self.training == "in-turn" else learner.fit
        fitted = fit(
            self.personal(received, state),
            train=self.trains,
            penalty=term if active else None,
            capture=active and self.regulariser == "R-cos",
        )
        return self.split(fitted)

    def trains(self, name: str) -> bool:
        """Under ``ffa`` the general A is a common constant."""
        return not (self.aggregation == "ffa" and ".lora_A.general." in name)

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average the general factors (or their products) and the head."""
        averaged = super().aggregate(server, replies)
        if self.aggregation != "svd":
            return averaged
        merged = pairs(average_products([(r.weight, r.state["shared"]) for r in replies], "general"), "general")
        # A product of zero (no B has moved yet) factors into two zeros, which no gradient ever leaves.
        moved = {layer: pair for layer, pair in merged.items() if pair[1].any()}
        return {**averaged, "shared": {**averaged["shared"], **named(moved, "general")}}

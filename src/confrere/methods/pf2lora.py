"""PF2LoRA: a common adapter, and at each site another one that follows it on a lower level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

from torch import Tensor

from confrere.adapters.algebra import cut
from confrere.adapters.names import slot_of
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, one_of, register
from confrere.tensors import State, Tensors
from confrere.tokenset import Batch


@register(
    "pf2lora",
    title="Common + client adapter on two levels (PF2LoRA)",
    paper="Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach via "
    "Two-Level LoRA, 2025, arXiv 2503.03920",
)
@dataclass(frozen=True, kw_only=True)
class PF2LoRA(Method):
    """Minimise ``mean_k F_k(x, y_k*(x))`` over the common adapter x with ``y_k*(x) = argmin_y F_k(x, y)`` at site k.

    ``W0 + s B A + s B_k A_k``, x = (A, B) and the shared head, y_k = (A_k, B_k). ``lower`` steps on y_k, then one on
    x, each on a batch of its own, until the round's steps are used up. x is averaged, y_k never leaves its site.

    Args:
        lower: steps on the client adapter for each step on the common one, at least 1.
        client: share of its slot's rank that the client adapter uses, in (0, 1], at least rank 1.
        head: ``shared`` (upper level) or ``local`` (lower level).

    Differences from the paper: written from its abstract and summaries. First-order: the gradient of ``y_k*`` with
    respect to x (a second derivative) is left out, as in first-order MAML. The budget of ranks gives both adapters the
    same; the paper's client adapter is smaller: that is ``client=0.5``. All steps count, of either level. The
    head's place and AdamW, one for both levels and fresh in every round, are ours.
    """

    slots: ClassVar[tuple[str, ...]] = ("general", "personal")
    search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "lower": ("choice", 1, 2, 4),
        "head": ("choice", "shared", "local"),
    }

    lower: int = 1
    client: float = 1.0
    head: str = "shared"

    def __post_init__(self) -> None:
        one_of("method.head", self.head, ("shared", "local"))
        if self.lower < 1:
            raise ConfigError("the client adapter needs steps", where="method.lower", fix="use lower=1")
        if not 0.0 < self.client <= 1.0:
            raise ConfigError(f"{self.client} is out of range", where="method.client", fix="use 0 < client <= 1")

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where a round is too short for a step on the common adapter."""
        if steps <= self.lower:
            raise ConfigError(
                f"{steps} steps a round leave the common adapter none",
                where="method.lower",
                fix=f"use train.steps={self.lower + 1} or fewer lower steps",
            )

    def shared(self, name: str) -> bool:
        """Return whether a tensor is sent: the common adapter is, the client's never, the head by policy."""
        return self.head == "shared" if name.startswith("head.") else slot_of(name) == "general"

    def init_site(self, params: Tensors) -> State:
        """Return the client adapter at its rank, and a local head."""
        private = super().init_site(params)["private"]
        full = min((len(t) for n, t in private.items() if ".lora_A." in n), default=1)
        return {"private": cut(private, max(1, round(self.client * full)))}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Take every step on one of the levels."""
        self.check(learner.settings.steps, learner.rounds)
        fitted = learner.fit(self.personal(received, state), loss=self.alternating(learner))
        private = {n: t for n, t in fitted.items() if not self.shared(n)}
        return {"shared": {n: t for n, t in fitted.items() if self.shared(n)}}, {"private": private}

    def alternating(self, learner: Learner) -> Callable[[Tensors, Batch], Tensor]:
        """Return the task loss, with gradient, batch by batch, for one level; AdamW leaves the other as it is."""
        turns = count()

        def loss(params: Tensors, batch: Batch) -> Tensor:
            upper = next(turns) % (self.lower + 1) == self.lower
            return learner.loss({n: t if self.shared(n) == upper else t.detach() for n, t in params.items()}, batch)

        return loss

"""FedRep: each round a site fits its head to the adapter it received, then the adapter to that head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import register
from confrere.methods.fedper import FedPer
from confrere.tensors import State


@register(
    "fedrep",
    title="Shared adapter, local head, in turns (FedRep)",
    paper="Collins et al., Exploiting Shared Representations for Personalized Federated Learning, ICML 2021, "
    "arXiv 2102.07089",
)
@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """Take the first steps of a round on the head alone, the others on the adapter alone; average the adapter.

    Args:
        head_share: share of the round's steps that train the head, in (0, 1); each part has at least one step. Both
            together take the steps of every other method, so the adapter takes fewer.

    Differences from the paper: the representation is LoRA factors in a frozen transformer; steps are divided instead
    of added (the paper takes many epochs of the head and one or a few of the body); AdamW instead of SGD. The recorded
    training loss is that of the adapter's steps.
    """

    whole: ClassVar[bool] = False
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"head_share": ("linear", 0.2, 0.8)}

    head_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.head_share < 1.0:
            raise ConfigError(
                f"{self.head_share} is out of range", where="method.head_share", fix="use 0 < head_share < 1"
            )

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where ``steps`` cannot be divided between head and adapter."""
        self.head_steps(steps)

    def head_steps(self, steps: int) -> int:
        """Return how many of a round's ``steps`` train the head.

        Raises:
            ConfigError: fewer than two steps cannot be divided.
        """
        if steps < 2:
            raise ConfigError(f"{steps} step cannot be divided", where="train.steps", fix="use train.steps=2 or more")
        return min(max(1, round(self.head_share * steps)), steps - 1)

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the head, then the adapter under it."""
        first = self.head_steps(learner.settings.steps)
        params = self.personal(received, state)
        fitted = learner.fit(params, train=lambda name: not self.shared(name), steps=first, tag="head")
        return self.split(learner.fit(fitted, train=self.shared, steps=learner.settings.steps - first))

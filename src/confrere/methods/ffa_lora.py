"""FFA-LoRA: A stays as drawn, B is averaged, so the average is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from confrere.adapters.names import side_of
from confrere.learner import Learner
from confrere.method import Method, register
from confrere.tensors import State


@register(
    "ffa-lora",
    title="One shared adapter, A frozen (FFA-LoRA)",
    paper="Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313",
)
@dataclass(frozen=True, kw_only=True)
class FFALoRA(Method):
    """Freeze A at one common draw; train and average B and the head: ``mean(B_k A) = mean(B_k) A``.

    A is the same at every site by the seed, so it is never sent; a message is about half of FedIT's.

    Differences from the paper: A is drawn as for every other method (uniform); the head is trained and averaged;
    a vision transformer; no noise for differential privacy, which the paper studies.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    """Nothing: A is never sent, but the same everywhere, so it is no part of a model of a site's own."""

    def shared(self, name: str) -> bool:
        """All but A."""
        return side_of(name) != "A"

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train B and the head."""
        return self.split(learner.fit(self.personal(received, state), train=self.shared))

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return all steps: what is sent is trained from what was received alone."""
        return steps

"""FedIT followed by local fine-tuning: the simplest personalised method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, register, rounds_before
from confrere.tensors import State, Tensors


@register(
    "fedit-ft",
    title="FedIT + local fine-tuning",
    paper="Zhang et al. 2024, arXiv 2305.05644; fine-tuning: ours",
)
@dataclass(frozen=True, kw_only=True)
class FedITFineTuned(Method):
    """Share one adapter for the first rounds, then let every site continue alone from it.

    Args:
        finetune: share of the rounds, at the end, spent on local fine-tuning, in (0, 1). The total number of
            local steps stays that of the other methods.

    Differences from the paper: fine-tuning is our addition, as in FLamby's ``fed_avg_fine_tuning``.
    """

    whole: ClassVar[bool] = True
    also_keeps: ClassVar[tuple[str, ...]] = ("fine-tuned adapter and head",)

    finetune: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.finetune < 1.0:
            raise ConfigError(f"{self.finetune} is out of range", where="method.finetune", fix="use 0 < finetune < 1")

    def shared_rounds(self, rounds: int) -> int:
        """Return the last round in which adapters are averaged (at least one)."""
        return rounds_before(self.finetune, rounds)

    def init_site(self, params: Tensors) -> State:
        """Return nothing: a site has no adapter of its own until fine-tuning starts."""
        return {"private": {}}

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the shared adapter, or, in the last rounds, the site's own copy of it."""
        together = learner.round <= self.shared_rounds(learner.rounds)
        fitted = learner.fit(self.personal(received, state), released=together)
        if together:
            return {"shared": fitted}, {"private": {}}
        return {}, {"private": fitted}

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return the adapter and head, and nothing in the last rounds."""
        return super().payload(params, received, round_, rounds) if round_ <= self.shared_rounds(rounds) else {}

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return all steps, and none in the last rounds, of which nothing is ever sent."""
        return steps if round_ <= self.shared_rounds(rounds) else 0

    def may_stop(self, round_: int, rounds: int) -> bool:
        """Return whether fine-tuning has begun: judgements before say nothing of it."""
        return round_ > self.shared_rounds(rounds)

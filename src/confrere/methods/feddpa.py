"""FedDPA: a global and a local adapter, trained one after the other (F) or in turn (T), mixed at test by image."""

from __future__ import annotations

from dataclasses import dataclass

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import register, rounds_before
from confrere.methods.mixing import Mixing
from confrere.methods.two_models import check_share, divide
from confrere.tensors import State, Tensors

PAPER = "Yang et al., Dual-Personalizing Adapter for Federated Foundation Models, NeurIPS 2024, arXiv 2403.19211"


@register("feddpa-t", title="Global + local adapter in turn, mixed by image (FedDPA-T)", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class FedDPAT(Mixing):
    """In every round train the local adapter beside the frozen global one (0.5 each), then the global one alone.

    For prediction see :class:`confrere.methods.mixing.Mixing`.

    Args:
        share: of a round's steps that train the local adapter, in (0, 1).
        w_max, anchors, head: see :class:`confrere.methods.mixing.Mixing`.

    Differences from the paper: a round's steps are divided between the two adapters. Reconstructed: the global
    adapter counts by ``1 - w``, hidden states are those of the model without adapters, a mean cosine below zero
    counts as zero, and the head's place (the paper's language models have none). Optimisers are fresh in each half.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where ``steps`` cannot be divided between two adapters."""
        divide(steps, self.share)

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the local adapter, then the global one, whose loss the record shows."""
        steps, own = divide(learner.settings.steps, self.share)
        params = self.fit_local(learner, self.personal(received, state), own)
        return self.split(self.fit_global(learner, params, steps))


@register("feddpa-f", title="Global adapter, then a local one, mixed by image (FedDPA-F)", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class FedDPAF(Mixing):
    """Train the global adapter over all sites; in the last rounds freeze it and train the local one beside it.

    For prediction see :class:`confrere.methods.mixing.Mixing`; while there is no local adapter, w = 0.

    Args:
        last: share of the rounds, at the end, in which the local adapter is trained, in (0, 1).
        w_max, anchors, head: see :class:`confrere.methods.mixing.Mixing`.

    Differences from the paper: the local adapter is trained in some of the rounds instead of after all of them.
    Reconstructed: as in :class:`FedDPAT`. A site that is never asked in the last rounds has the global model.
    """

    last: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.last < 1.0:
            raise ConfigError(f"{self.last} is out of range", where="method.last", fix="use 0 < last < 1")

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where one of the adapters would have no round."""
        if rounds < 2:
            raise ConfigError("one round cannot train two adapters in turn", where="rounds", fix="use rounds=2")

    def shared_rounds(self, rounds: int) -> int:
        """Return the last round in which the global adapter is trained (at least one)."""
        return rounds_before(self.last, rounds)

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the global adapter, or, in the last rounds, the local one, of which nothing is sent."""
        params, steps = self.personal(received, state), learner.settings.steps
        if learner.round <= self.shared_rounds(learner.rounds):
            return self.split(self.fit_global(learner, params, steps))
        return {}, self.init_site(self.fit_local(learner, params, steps))

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return the global adapter and a shared head, and nothing in the last rounds."""
        return super().payload(params, received, round_, rounds) if round_ <= self.shared_rounds(rounds) else {}

    def may_stop(self, round_: int, rounds: int) -> bool:
        """Return whether the local adapter is being trained: judgements before say nothing of it."""
        return round_ > self.shared_rounds(rounds)

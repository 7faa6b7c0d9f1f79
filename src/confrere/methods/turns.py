"""Two adapters in turn: the general one as if there were no personal one, then the personal one beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, one_of
from confrere.methods.two_models import divide
from confrere.tensors import Tensors
from confrere.tokenset import Batch

HALF = 0.5
"""Share of a round's steps that train the personal adapter."""


@dataclass(frozen=True, kw_only=True)
class Turns(Method):
    """A general adapter for all and a personal one, trained jointly or in turn. Not registered: a base class.

    Args:
        training: ``joint`` or ``in-turn``.
        head: ``shared``; or ``local``, with which a general adapter cannot be trained alone.
    """

    training: str = "joint"
    head: str = "shared"

    def __post_init__(self) -> None:
        one_of("method.training", self.training, ("joint", "in-turn"))
        if self.training == "in-turn" and self.head != "shared":
            what = "a general adapter that is trained alone needs a head that is shared"
            raise ConfigError(what, where="method.head", fix='use head="shared", or training="joint"')

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where ``steps`` cannot be divided between two adapters."""
        if self.training == "in-turn":
            divide(steps, HALF)

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return the steps of the general adapter alone; noise would not do where a personal one moves it."""
        return divide(steps, HALF)[0] if self.training == "in-turn" else None


def in_turn(
    learner: Learner,
    params: Tensors,
    *,
    train: Callable[[str], bool],
    penalty: Callable[[Tensors, Batch], Tensor] | None,
    capture: bool,
) -> dict[str, Tensor]:
    """Return ``params`` after a round: general adapter and head alone, then the personal adapter, both others frozen.

    What a site has trained for itself, without noise, is zero in the first half: it moves no gradient of what will be
    sent. The ``penalty`` belongs to the second half. Arguments as for :meth:`confrere.learner.Learner.fit`.
    """
    first, second = divide(learner.settings.steps, HALF)
    alone = {name: torch.zeros_like(t) if _personal(name) else t for name, t in params.items()}
    fitted = learner.fit(alone, train=lambda n: not _personal(n) and train(n), steps=first, tag="general")
    both = {**fitted, **{name: t for name, t in params.items() if _personal(name)}}
    return learner.fit(
        both, train=_personal, penalty=penalty, capture=capture, steps=second, tag="personal", released=False
    )


def _personal(name: str) -> bool:
    return ".personal." in name

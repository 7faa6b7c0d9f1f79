"""What methods with a global and a personal model share: a round's steps are divided between the two."""

from __future__ import annotations

from dataclasses import dataclass

from confrere.errors import ConfigError
from confrere.method import Method
from confrere.tensors import State, Tensors


@dataclass(frozen=True, kw_only=True)
class TwoModels(Method):
    """A global model as in FedAvg and a whole personal one beside it. Not registered: a base class.

    Args:
        share: of a round's steps that train the personal model, in (0, 1).
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_share(self.share)

    def check(self, steps: int, rounds: int) -> None:
        """Raise ConfigError where ``steps`` cannot be divided between two models."""
        divide(steps, self.share)

    def init_site(self, params: Tensors) -> State:
        """Return nothing: the personal model starts from the first global one."""
        return {"private": {}}


def check_share(share: float) -> None:
    """Raise ConfigError unless ``share`` leaves steps for both models."""
    if not 0.0 < share < 1.0:
        raise ConfigError(f"{share} is out of range", where="method.share", fix="use 0 < share < 1")


def divide(steps: int, share: float) -> tuple[int, int]:
    """Return a round's steps for the global and for the personal model, at least one each.

    Raises:
        ConfigError: a single step cannot be divided.
    """
    if steps < 2:
        raise ConfigError("one step a round cannot train two models", where="train.steps", fix="use train.steps=2")
    own = min(max(1, round(share * steps)), steps - 1)
    return steps - own, own

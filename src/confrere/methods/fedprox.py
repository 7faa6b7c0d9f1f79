"""FedProx: one shared adapter, held near where the round began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, register
from confrere.tensors import State, Tensors, pick, sq_dist
from confrere.tokenset import Batch


@register(
    "fedprox",
    title="One shared adapter, proximal term (FedProx)",
    paper="Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, arXiv 1812.06127",
)
@dataclass(frozen=True, kw_only=True)
class FedProx(Method):
    """Add ``mu/2 ||w - w_received||^2`` over the shared tensors to each batch's loss; average as FedIT does.

    Args:
        mu: weight of the term, >= 0; 0 is FedIT, bit by bit.

    Differences from the paper: LoRA factors and a head instead of whole models; AdamW, which rescales the term's
    gradient with the task's, and a clip on the sum of both; a fixed number of local steps, no gamma-inexactness.
    """

    whole: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"mu": ("log", 1e-3, 1.0)}

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.mu < float("inf"):
            raise ConfigError(f"{self.mu} is out of range", where="method.mu", fix="use mu >= 0, e.g. 0.01")

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train with the pull towards what was received; what stays at the site is not pulled."""
        anchor = {name: value.to(learner.backbone.device) for name, value in received["shared"].items()}

        def pull(params: Tensors, batch: Batch) -> Tensor:
            return self.mu / 2 * sq_dist(pick(params, lambda name: name in anchor), anchor)

        return self.split(learner.fit(self.personal(received, state), penalty=pull if self.mu > 0 else None))

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return all steps: the pull reads tensors alone."""
        return steps

"""APFL: every site predicts with its own mixture of a personal and the global model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import register
from confrere.methods.two_models import TwoModels, divide
from confrere.tensors import State, Tensors
from confrere.tokenset import Batch


@register(
    "apfl",
    title="Mixture of personal and global model (APFL)",
    paper="Deng et al., Adaptive Personalized Federated Learning, 2020, arXiv 2003.13461",
)
@dataclass(frozen=True, kw_only=True)
class APFL(TwoModels):
    """Predict with ``m = alpha v + (1 - alpha) w``, tensor by tensor: v is the site's own, w the global model.

    ``w`` is trained as in FedAvg. ``v`` is trained through the mixture with the site's own trained ``w'``, so its
    gradient is ``alpha grad F(m)``. If ``adaptive``, after every round, clipped to [0, 1]:
    ``alpha <- alpha - alpha_lr * mean over steps of <v - w', grad F(m)>``. ``v`` and ``alpha`` never leave the site.

    Args:
        alpha: weight of the personal model, in [0, 1]; the first value if ``adaptive``.
        adaptive: whether every site learns its own alpha.
        alpha_lr: step size of alpha, >= 0.
        share: of a round's steps that train the personal model, in (0, 1).

    Differences from the paper: models are adapters and head, so factors are mixed, not products; a round's steps are
    divided between w and v, w first (the paper steps both at once, in full); AdamW, fresh in every round, but a
    plain gradient step for alpha with a step size of its own, once a round. ``v`` starts from the global model that
    the site first receives. A site that never trained predicts with the global model.
    """

    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"alpha": ("linear", 0.1, 0.9), "alpha_lr": ("log", 1e-2, 1.0)}
    also_keeps: ClassVar[tuple[str, ...]] = ("personal model: adapter and head", "weight of the mixture")

    alpha: float = 0.5
    adaptive: bool = True
    alpha_lr: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"{self.alpha} is out of range", where="method.alpha", fix="use 0 <= alpha <= 1")
        if not (0.0 <= self.alpha_lr < float("inf")):
            raise ConfigError(f"{self.alpha_lr} is out of range", where="method.alpha_lr", fix="use alpha_lr >= 0")
        super().__post_init__()

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the global model, then the personal one through the mixture, then move alpha."""
        shared, own = divide(learner.settings.steps, self.share)
        device = learner.backbone.device
        sent = learner.fit(received["shared"], steps=shared)
        fixed = {name: t.to(device) for name, t in sent.items()}
        # A leaf of the graph: its gradient, <v - w', grad F(m)>, adds up over the steps of the fit.
        alpha = self.weight(state).to(device, copy=True).requires_grad_()

        def through(params: Tensors, batch: Batch) -> Tensor:
            return learner.loss(mixture(alpha, params, fixed), batch)

        personal = learner.fit(state.get("private") or received["shared"], loss=through, steps=own, tag="personal")
        moved = alpha.detach().cpu()
        if self.adaptive and alpha.grad is not None:
            moved = (moved - self.alpha_lr * alpha.grad.cpu() / own).clamp(0, 1)
        return {"shared": sent}, {"private": personal, "mixture": {"alpha": moved}}

    def weight(self, state: State) -> Tensor:
        """Return the site's alpha, a scalar."""
        return state["mixture"]["alpha"] if "mixture" in state else torch.tensor(self.alpha)

    def personal(self, received: State, state: State) -> Tensors:
        """Return the mixture, or the global model before the site has one of its own."""
        if not state.get("private"):
            return received["shared"]
        return mixture(self.weight(state), state["private"], received["shared"])


def mixture(alpha: Tensor, own: Tensors, other: Tensors) -> dict[str, Tensor]:
    """Return ``alpha own + (1 - alpha) other``, name by name."""
    return {name: alpha * value + (1 - alpha) * other[name] for name, value in own.items()}

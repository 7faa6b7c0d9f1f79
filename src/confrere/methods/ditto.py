"""Ditto: a personal model that is pulled towards the global one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import register
from confrere.methods.two_models import TwoModels, divide
from confrere.tensors import State, Tensors, sq_dist


@register(
    "ditto",
    title="Personal model pulled to the global one (Ditto)",
    paper="Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021, arXiv 2012.04221",
)
@dataclass(frozen=True, kw_only=True)
class Ditto(TwoModels):
    """Train the global model as in FedAvg, and beside it a model of the site's own that may not stray far from it.

    With ``w`` the global model as received, site k keeps ``v`` and minimises ``F_k(v) + lam/2 ||v - w||^2``
    (Algorithm 1), over all adapter and head tensors. Only the trained ``w`` is sent.

    Args:
        lam: strength of the pull, >= 0; 0 is local training, a large value FedAvg.
        share: of a round's steps that train the personal model, in (0, 1); the rest trains the global one.

    Differences from the paper: both models are adapters and head; a round's steps are divided between the two models
    (the paper trains each in full); AdamW, fresh in every round. A personal model starts from the global model
    that its site first receives. A site that never trained predicts with the global model.
    """

    whole: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lam": ("log", 1e-3, 1.0), "share": ("choice", 0.3, 0.5, 0.7)}
    also_keeps: ClassVar[tuple[str, ...]] = ("personal model: adapter and head",)

    lam: float = 0.1

    def __post_init__(self) -> None:
        if not (0.0 <= self.lam < float("inf")):
            raise ConfigError(f"{self.lam} is out of range", where="method.lam", fix="use lam >= 0")
        super().__post_init__()

    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Train the global model, then the personal one, whose loss the record shows."""
        shared, own = divide(learner.settings.steps, self.share)
        anchor = {name: t.to(learner.backbone.device) for name, t in received["shared"].items()}
        sent = learner.fit(received["shared"], steps=shared)
        personal = learner.fit(
            self.personal(received, state),
            penalty=lambda params, _: 0.5 * self.lam * sq_dist(params, anchor),
            steps=own,
            tag="personal",
        )
        return {"shared": sent}, {"private": personal}

    def personal(self, received: State, state: State) -> Tensors:
        """Return the site's own model, or the global one before it has any."""
        return state.get("private") or received["shared"]

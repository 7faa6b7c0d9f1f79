"""Prediction by several models at once: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from confrere.adapters.vectors import RANKS, members
from confrere.backbones import Backbone
from confrere.method import Method, one_of
from confrere.tensors import State, Tensors


@dataclass(frozen=True, kw_only=True)
class Ensemble(Method):
    """Predict with one model, or with all that :func:`confrere.adapters.vectors.stack` put side by side.

    Not registered: a base class.

    Args:
        predicts: ``fused``, the ``ensemble`` of the sites' models or the site's ``own`` model.
    """

    targets: ClassVar[tuple[str, ...]] = ("label",)

    predicts: str = "fused"

    def __post_init__(self) -> None:
        one_of("method.predicts", self.predicts, ("fused", "ensemble", "own"))

    @property
    def needs(self) -> Literal["sum", "each"]:
        """Members are kept apart."""
        return "each"

    def personal(self, received: State, state: State) -> Tensors:
        """Return the mixture, or the own model if that is asked for or there is no mixture."""
        own = state.get("shared", {})
        return own if own and self.predicts == "own" else received.get("shared") or own or state["private"]

    def scores(self, backbone: Backbone, params: Tensors, tokens: Tensor) -> Tensor:
        """Return class scores (B, K); of an ensemble, the logarithm of the mean of its members' probabilities."""
        if self.predicts != "ensemble" and RANKS not in params:
            return backbone.logits(params, tokens)
        return together(backbone, members(params) if RANKS in params else [params], tokens)  # the own: no vector came

    def additive(self) -> bool:
        """Return whether prediction is that of one adapter: an ensemble's is not."""
        return self.predicts != "ensemble"


def together(backbone: Backbone, models: Iterable[Tensors], tokens: Tensor) -> Tensor:
    """Return class scores (B, K): the logarithm of the mean of the models' probabilities."""
    chances = [backbone.logits(model, tokens).softmax(1) for model in models]
    return torch.stack(chances).mean(0).clamp_min(1e-12).log()

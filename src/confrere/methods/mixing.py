"""What FedDPA-F and FedDPA-T have in common: two adapters, mixed for each image by its likeness to the site's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from confrere.adapters.names import side_of, slot_of
from confrere.backbones import Backbone
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Reply, one_of, sent_by
from confrere.seeds import numpy_generator
from confrere.tensors import State, Tensors, weighted_mean

ANCHORS = "anchors.features"


@dataclass(frozen=True, kw_only=True)
class Mixing(Method):
    """Predict with ``y = W0 x + s (1 - w) B_g A_g x + s w B_k A_k x``, w being the image's own.

    ``w = w_max * max(0, mean over anchors a of cos(f, a))``, where f is the image's feature vector (the last hidden
    state, pooled) in the model without adapters; the anchors (n, F) are those of training images drawn once. The
    global adapter and a shared head are averaged with equal weights; anchors and local adapter never leave the site.
    A site that never trained a local adapter has no anchors: w = 0. Not registered: a base class.

    Args:
        w_max: largest weight of the local adapter, in [0, 1].
        anchors: how many training images are remembered, at least 1.
        head: ``shared`` (part of the global model) or ``local`` (trained with both adapters).
    """

    slots: ClassVar[tuple[str, ...]] = ("general", "personal")
    targets: ClassVar[tuple[str, ...]] = ("label", "labels", "time")
    also_keeps: ClassVar[tuple[str, ...]] = ("features of a few training images",)
    search: ClassVar[dict[str, Any]] = {"w_max": ("linear", 0.2, 0.8), "head": ("choice", "shared", "local")}

    w_max: float = 0.5
    anchors: int = 5
    head: str = "shared"

    def __post_init__(self) -> None:
        one_of("method.head", self.head, ("shared", "local"))
        if not 0.0 <= self.w_max <= 1.0:
            raise ConfigError(f"{self.w_max} is out of range", where="method.w_max", fix="use 0 <= w_max <= 1")
        if self.anchors < 1:
            raise ConfigError("at least one anchor is needed", where="method.anchors", fix="use anchors=5")

    @property
    def needs(self) -> Literal["sum", "each"]:
        """The only sum a server is offered has the sites' weights, and the mean here has equal ones."""
        return "each"

    def shared(self, name: str) -> bool:
        """Return whether a tensor is sent: the global adapter is, the local one never, the head by policy."""
        return self.head == "shared" if name.startswith("head.") else slot_of(name) == "general"

    def fit_local(self, learner: Learner, params: Tensors, steps: int) -> dict[str, Tensor]:
        """Return ``params`` after steps on what is not shared, both adapters counting by half; with anchors."""
        fitted = learner.fit(
            params,
            train=lambda n: n != ANCHORS and not self.shared(n),
            loss=lambda given, batch: learner.loss(scaled(given, {"general": 0.5, "personal": 0.5}), batch),
            steps=steps,
            tag="personal",
        )
        return fitted if ANCHORS in fitted else {**fitted, ANCHORS: self.draw_anchors(learner, params)}

    def fit_global(self, learner: Learner, params: Tensors, steps: int) -> dict[str, Tensor]:
        """Return ``params`` after steps on global adapter and head, as if there were no local adapter."""
        return learner.fit(
            params,
            train=lambda n: n.startswith("head.") or slot_of(n) == "general",
            loss=lambda given, batch: learner.loss(scaled(given, {"personal": 0.0}), batch),
            steps=steps,
        )

    def draw_anchors(self, learner: Learner, params: Tensors) -> Tensor:
        """Return features (n, F) of ``anchors`` training images, or of all where there are fewer."""
        rows = numpy_generator(learner.seed, "anchors", learner.site).permutation(learner.data.rows("train"))
        with torch.no_grad():
            return bare_features(learner.backbone, params, learner.data.batch(rows[: self.anchors]).tokens).cpu()

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Average what was sent with equal weights."""
        sent = [(1.0, tensors) for _, tensors in sent_by(replies)]
        return {**server, "shared": weighted_mean(sent)} if sent else server

    def scores(self, backbone: Backbone, params: Tensors, tokens: Tensor) -> Tensor:
        """Return class scores (B, K), each image weighing the two adapters by its likeness to the anchors."""
        if ANCHORS not in params:
            return backbone.logits(scaled(params, {"personal": 0.0}), tokens)
        alike = likeness(bare_features(backbone, params, tokens), params[ANCHORS].to(backbone.device))
        with backbone.weighing(torch.stack([1 - self.w_max * alike, self.w_max * alike], 1)):
            return backbone.logits(params, tokens)


def scaled(params: Tensors, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return ``params`` with every slot named in ``weights`` counting by its weight: B is multiplied."""
    by = {n: weights.get(str(slot_of(n)), 1.0) if side_of(n) == "B" else 1.0 for n in params}
    return {n: t if by[n] == 1.0 else t * by[n] for n, t in params.items()}


def bare_features(backbone: Backbone, params: Tensors, tokens: Tensor) -> Tensor:
    """Return features (B, F) of the model with all adapters at zero, which no training changes."""
    return backbone.features(scaled(params, {"general": 0.0, "personal": 0.0}), tokens)


def likeness(features: Tensor, anchors: Tensor) -> Tensor:
    """Return the mean cosine (B,) of features (B, F) with anchors (n, F), negative means counted as zero."""
    return (normalize(features, dim=1) @ normalize(anchors, dim=1).T).mean(1).clamp(0, 1)

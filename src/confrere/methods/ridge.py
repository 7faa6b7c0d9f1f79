"""Federated ridge regression: the best linear head on frozen features, in closed form from one sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from confrere.adapters import head
from confrere.errors import ConfigError
from confrere.learner import Learner
from confrere.method import Method, Reply, register
from confrere.tensors import State, Tensors, weighted_mean

SHARPNESS = 10.0
"""Targets are 0 or 1, logits are read as log-odds: without a factor every probability would be near 1/K."""


@register(
    "ridge",
    title="Closed-form head on frozen features (ridge)",
    paper="He et al., AFL: A Single-Round Analytic Approach for Federated Learning with Pre-trained Models, "
    "CVPR 2025, arXiv 2405.16240",
)
@dataclass(frozen=True, kw_only=True)
class Ridge(Method):
    """Minimise ``sum_n w_n ||y_n - V f_n - v||^2 + rho ||V||^2`` exactly: y one-hot, f frozen features, v not shrunk.

    With z = (f, 1) a site sends ``G = sum_n w_n z z^T`` (F + 1, F + 1) and ``M = sum_n w_n z y^T`` (F + 1, K), both in
    float64; the server averages them by the sites' weights and solves ``(G + rho I') (V, v)^T = M``. Weights w_n sum
    to 1 at each site: equal with ``train.balance="none"``, else ``1 / (classes at the site * images of the class at
    the site)``. The answer is that of the pooled images, whoever holds them, with ``train.balance="none"`` and
    ``federation.weights="images"`` only: otherwise it depends on who holds what. Logits are ``SHARPNESS * (V f + v)``.

    One round is enough (``rounds=1``); more repeat it, and each counts only the sites it asked. Adapters stay at zero.

    Args:
        lam: rho in units of the mean variance of the features, > 0.

    Differences from the paper: AFL sends each site's own solution and merges solutions; the statistics that its law
    restores are sent instead, which gives the same answer and needs only a sum. The unshrunk intercept, balanced
    weights and rho by variance are ours. Balance over all sites would need G of each class, K times as much. G and M
    say much about few images: sum them securely.
    """

    sends: ClassVar[tuple[str, ...]] = ("statistics",)
    also_sends: ClassVar[tuple[str, ...]] = ("second moments of features and labels",)
    closed_form: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("label",)
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"lam": ("log", 1e-4, 10.0)}

    lam: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.lam < float("inf"):
            raise ConfigError(f"{self.lam} is out of range", where="method.lam", fix="use lam > 0")

    def shared(self, name: str) -> bool:
        """Return whether the server has a tensor: the head; adapters stay as they were drawn, at zero."""
        return name.startswith("head.")

    @torch.no_grad()
    def update(self, learner: Learner, received: State, state: State) -> tuple[State, State]:
        """Return the site's moments; its metric is the squared error of the head it received."""
        params = self.personal(received, state)
        weights = image_weights(learner)
        gram, moment, error = torch.zeros(()), torch.zeros(()), 0.0
        for batch in learner.sweep("train"):
            features = learner.features(params, batch).cpu().double()
            labels = batch.labels.cpu()
            z = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
            y = torch.nn.functional.one_hot(labels, len(learner.data.classes)).double()
            w = weights[labels][:, None]
            gram, moment = gram + z.T @ (w * z), moment + z.T @ (w * y)
            fitted = features @ params[head.WEIGHT].double().T + params[head.BIAS].double()
            error += float((w * (y - fitted / SHARPNESS).square()).sum())
        learner.metrics["loss"] = error
        return {"statistics": {"gram": gram, "moment": moment}}, state

    def payload(self, params: Tensors, received: State, round_: int, rounds: int) -> State:
        """Return both moments."""
        classes, features = params[head.WEIGHT].shape
        gram, moment = (torch.empty(features + 1, n, dtype=torch.float64) for n in (features + 1, classes))
        return {"statistics": {"gram": gram, "moment": moment}}

    def plausible(self, payload: State) -> bool:
        """Return whether weights of sum 1 can give these moments: the last z is 1, the y of an image sum to 1."""
        gram, moment = payload["statistics"]["gram"], payload["statistics"]["moment"]
        hair = 1e-6 * gram.diagonal().mean().clamp_min(0)
        sums = torch.cat([moment.sum(1) - gram[-1], gram[-1:, -1] - 1]).abs()
        square = torch.linalg.cholesky_ex(gram + hair * torch.eye(len(gram), dtype=gram.dtype)).info == 0
        return bool(square and (gram - gram.T).abs().max() <= hair and sums.max() <= hair and moment[-1].min() >= 0)

    def aggregate(self, server: State, replies: Sequence[Reply]) -> State:
        """Solve for the head from the weighted mean of the moments."""
        sent = [(reply.weight, reply.state["statistics"]) for reply in replies if reply.state.get("statistics")]
        return {**server, "shared": solve(weighted_mean(sent), self.lam)} if sent else server


def image_weights(learner: Learner) -> Tensor:
    """Return what an image of each class counts (K,), float64; over all training images of the site the sum is 1."""
    labels = torch.from_numpy(learner.data.labels[learner.data.rows("train")])
    counts = torch.bincount(labels, minlength=len(learner.data.classes)).double()
    if learner.settings.balance == "none":
        return torch.full_like(counts, 1 / len(labels))
    return torch.where(counts > 0, 1 / counts.clamp_min(1) / (counts > 0).sum(), 0.0)


def solve(moments: Tensors, lam: float) -> dict[str, Tensor]:
    """Return the head for ``gram`` (F + 1, F + 1) and ``moment`` (F + 1, K) with weights of sum 1 (the last z is 1)."""
    gram, moment = moments["gram"], moments["moment"]
    variance = (gram.diagonal()[:-1] - gram[-1, :-1].square()).mean().clamp_min(1e-12)
    penalty = torch.full((len(gram),), lam, dtype=gram.dtype) * variance
    penalty[-1] = 0.0
    found = SHARPNESS * torch.linalg.solve(gram + torch.diag(penalty), moment)
    return {head.WEIGHT: found[:-1].T.float().contiguous(), head.BIAS: found[-1].float()}

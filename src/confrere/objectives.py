"""Task losses of single-label classification, by name.

Every loss is a plain mean over the batch of per-image terms, so that an image's gradient does not depend on
the company it is drawn in: per-example gradients (differential privacy) and batches of any size then agree.

Shapes: B images of a batch, K classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from confrere.errors import ConfigError

Objective = Callable[[Tensor, Tensor], Tensor]
FOCUS = 2.0


def class_weights(counts: Sequence[int]) -> Tensor:
    """Return balanced class weights (K,) in float32: inversely proportional to the number of images.

    Absent classes get weight 0; the mean weight over the counted images is 1, so that the step size means the
    same with and without weights.

    Args:
        counts: images per class, K non-negative numbers, not all zero.

    Raises:
        ConfigError: a count is negative, or there are no images at all.

    >>> class_weights([30, 10, 0]).tolist()
    [0.6666666865348816, 2.0, 0.0]
    """
    images = torch.as_tensor(list(counts), dtype=torch.float64)
    if not images.numel() or bool((images < 0).any()) or not float(images.sum()) > 0:
        raise ConfigError(
            "class weights need non-negative counts with at least one image",
            where=f"counts for {len(images)} classes",
            fix="count the labels of the training images",
        )
    present = images > 0
    inverse = torch.where(present, 1 / images.clamp(min=1), 0.0)
    return (inverse * images.sum() / present.sum()).float()


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, a scalar."""
    return torch.nn.functional.cross_entropy(logits_BK, labels_B)


def weighted_cross_entropy(logits_BK: Tensor, labels_B: Tensor, weights_K: Tensor) -> Tensor:
    """Return the mean over images of ``w_y * cross-entropy``, a scalar.

    Unlike ``torch.nn.CrossEntropyLoss(weight=w)`` it divides by B, not by the batch's sum of weights.
    """
    losses_B = torch.nn.functional.cross_entropy(logits_BK, labels_B, reduction="none")
    return (weights_K.to(losses_B)[labels_B] * losses_B).mean()


def focal(logits_BK: Tensor, labels_B: Tensor, weights_K: Tensor | None = None, *, gamma: float = FOCUS) -> Tensor:
    """Return the focal loss, the mean of ``w_y (1 - p_y)^gamma * -log p_y``, a scalar.

    Args:
        logits_BK: scores.
        labels_B: classes 0..K-1.
        weights_K: class weights (the paper's alpha); default: ones.
        gamma: focus, at least 0; 0 is cross-entropy.

    References:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017.
    """
    losses_B = torch.nn.functional.cross_entropy(logits_BK, labels_B, reduction="none")
    # 1 - exp(-loss) by expm1: exact for sure predictions. The floor keeps the gradient finite at p = 1.
    focus_B = (-torch.expm1(-losses_B)).clamp(min=torch.finfo(losses_B.dtype).tiny) ** gamma
    losses_B = focus_B * losses_B
    return (losses_B if weights_K is None else weights_K.to(losses_B)[labels_B] * losses_B).mean()


def names() -> tuple[str, ...]:
    """Return the names that :func:`objective` knows."""
    return tuple(_REGISTRY)


def objective(name: str, class_weights: Tensor | None = None) -> Objective:
    """Return the loss ``(logits (B, K), labels (B,)) -> scalar`` of that name.

    Args:
        name: one of :func:`names`.
        class_weights: (K,) non-negative; required by ``weighted-cross-entropy``, optional for ``focal``,
            refused by ``cross-entropy``.

    Raises:
        ConfigError: the name is unknown, or weights are missing, not wanted, or not finite and non-negative.

    >>> loss = objective("cross-entropy")
    >>> round(float(loss(torch.zeros(2, 4), torch.tensor([0, 3]))), 4)
    1.3863
    """
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name, _REGISTRY, n=1)
        raise ConfigError(
            f"unknown objective {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            where="objective",
            fix=f"use one of {', '.join(_REGISTRY)}",
        )
    if class_weights is not None and not bool((torch.isfinite(class_weights) & (class_weights >= 0)).all()):
        raise ConfigError(
            "class weights must be finite and not negative",
            where=f"objective {name}",
            fix="use class_weights(counts) on the training labels",
        )
    return _REGISTRY[name](class_weights)


def _plain(weights: Tensor | None) -> Objective:
    if weights is not None:
        raise ConfigError(
            "plain cross-entropy takes no class weights",
            where="objective cross-entropy",
            fix="use weighted-cross-entropy, or leave the weights out",
        )
    return cross_entropy


def _weighted(weights: Tensor | None) -> Objective:
    if weights is None:
        raise ConfigError(
            "weighted cross-entropy needs class weights",
            where="objective weighted-cross-entropy",
            fix="pass class_weights(counts) of the training labels, or use cross-entropy",
        )
    return lambda logits, labels: weighted_cross_entropy(logits, labels, weights)


def _focal(weights: Tensor | None) -> Objective:
    return lambda logits, labels: focal(logits, labels, weights)


_REGISTRY: dict[str, Callable[[Tensor | None], Objective]] = {
    "cross-entropy": _plain,
    "weighted-cross-entropy": _weighted,
    "focal": _focal,
}

"""The linear classification head, kept apart from the adapters under the names ``head.weight`` and ``head.bias``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WEIGHT, BIAS = "head.weight", "head.bias"
NAMES = (WEIGHT, BIAS)


def shapes(classes: int, features: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the head's tensors."""
    return {WEIGHT: (classes, features), BIAS: (classes,)}


def init(
    classes: int, features: int, generator: torch.Generator | None = None, *, std: float = 0.0
) -> dict[str, torch.Tensor]:
    """Return a head of shape ``(classes, features)`` with zero bias.

    Args:
        classes: number of classes.
        features: width of the backbone's feature vector.
        generator: source of the weights; needed only when ``std`` is positive.
        std: standard deviation of the weights. Zero gives every class the same probability before training;
            a positive value lets gradients reach the adapters in the very first step.
    """
    import torch

    weight = torch.zeros(classes, features)
    if std > 0:
        weight = torch.randn(classes, features, generator=generator) * std
    return {WEIGHT: weight, BIAS: torch.zeros(classes)}

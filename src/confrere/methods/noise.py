"""Parts of methods that hide who took part: the size of a change, its clip, and noise."""

from __future__ import annotations

import math

from torch import Tensor

from confrere.errors import TrainingError
from confrere.privacy.noise import normal
from confrere.tensors import Tensors

__all__ = ["clipped", "norm", "normal"]


def norm(tensors: Tensors, start: Tensors | None = None) -> float:
    """Return the Euclidean norm over all tensors, or of what they are away from ``start``, in float64."""
    gaps = [value.double() - (start[name].double() if start else 0.0) for name, value in tensors.items()]
    return math.sqrt(sum(float(gap.square().sum()) for gap in gaps))


def clipped(tensors: Tensors, start: Tensors, most: float) -> dict[str, Tensor]:
    """Return ``start`` plus the change to ``tensors``, scaled down until its norm, as stored, is at most ``most``.

    Raises:
        TrainingError: the change is not finite.
    """
    size = norm(tensors, start)
    if not math.isfinite(size):
        raise TrainingError("the change of a site is not finite", fix="lower train.lr", code="diverged")
    scale, less, sent = min(1.0, most / size) if size else 1.0, 1e-7, dict(tensors)
    while norm(sent, start) > most:
        for name, value in tensors.items():
            first = start[name].double()
            sent[name] = (first + scale * (value.double() - first)).to(value.dtype)
        scale, less = scale * max(0.0, 1 - less), less * 4  # rounding may have added something
    return sent

"""Where features lie: a noisy mean of them, so that a clip is spent on how images differ, not on what all share.

The gradient of a linear head ``W f + b`` is an outer product with the feature vector f, and most of the norm of frozen
features is a part that all images share. Noisy steps train ``W (f - c) + b'`` instead: the same model, with
``b = b' - W c``, whatever c is. It comes from releases of the same mechanism, with the clip and the noise of gradients:
the gradient of ``-<f, c> C / R`` with respect to c, where R is how long features of random pictures are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from confrere.adapters.head import BIAS, NAMES, WEIGHT
from confrere.backbones import Backbone
from confrere.privacy.mechanism import Mechanism
from confrere.seeds import numpy_generator
from confrere.tensors import State, Tensors

GROUP = "centre"
"""Of a site's state: the sum of all releases of the mean feature, and [how many, variance of the noise of that sum]."""
ENOUGH = 0.1
"""No more is spent on a mean whose noise is shorter than this share of it."""
PICTURES, PATCHES = 4, 5


def applies(backbone: Backbone, trained: Collection[str]) -> bool:
    """Return whether the head is linear in one feature vector an image, and trained."""
    task = backbone.task
    flat = backbone.anatomy.accept is None and len(backbone.image_size) == 2 and not task.dense
    return flat and task.heads == NAMES and all(name in trained for name in NAMES)


@torch.no_grad()
def reach(backbone: Backbone, params: Tensors) -> float:
    """Return R: the mean norm of features of pictures that are nobody's, squares of random colours."""
    height, width = backbone.image_size
    colours = numpy_generator(0, GROUP).integers(256, size=(PICTURES, PATCHES, PATCHES, 3), dtype="uint8")
    rows, columns = -(-height // PATCHES), -(-width // PATCHES)
    pictures = colours.repeat(rows, axis=1).repeat(columns, axis=2)[:, :height, :width]
    return float(backbone.features(params, backbone.prefix(pictures)).square().sum(1).sqrt().mean()) or 1.0


def mean(kept: Tensors) -> Tensor:
    """Return the mean of the releases (F,), shortened by what is expected to be noise (James and Stein, 1961)."""
    count, variance = kept["said"].tolist()
    count = max(1.0, count)
    found: Tensor = kept["total"] / count
    square = float(found.square().sum())
    share: float = 1.0 - variance / count**2 / square if square else 0.0
    return found * max(0.0, share)


def wanted(kept: Tensors) -> bool:
    """Return whether the mean is still too noisy."""
    count, variance = kept["said"].tolist()
    return not count or variance > (ENOUGH * float(kept["total"].norm())) ** 2


def of(beside: State, width: int) -> dict[str, Tensor]:
    """Return what a site has kept, or nothing yet, for features of a width."""
    return dict(beside.get(GROUP) or {"total": torch.zeros(width), "said": torch.zeros(2, dtype=torch.float64)})


def added(kept: Tensors, release: Tensor, mechanism: Mechanism, reach: float) -> dict[str, Tensor]:
    """Return what is kept after one more release of the mean feature (F,), whose noise the mechanism and R tell."""
    noise = len(release) * (mechanism.sigma * reach / mechanism.expected) ** 2
    said = kept["said"] + torch.tensor([1.0, noise], dtype=torch.float64)
    return {"total": kept["total"] + release, "said": said}


@dataclass(frozen=True)
class Coordinates:
    """Those in which a head is trained: on features less ``middle`` (F,), or as it is (None)."""

    middle: Tensor | None = None

    def enter(self, params: Tensors) -> Tensors:
        """Return ``params`` with the bias ``b + W c``."""
        return self._moved(params, 1.0)

    def leave(self, params: Tensors) -> Tensors:
        """Return ``params`` with the bias ``b - W c``."""
        return self._moved(params, -1.0)

    def _moved(self, params: Tensors, sign: float) -> Tensors:
        if self.middle is None:
            return params
        weight = params[WEIGHT]
        return {**params, BIAS: params[BIAS] + sign * weight @ self.middle.to(weight.device)}

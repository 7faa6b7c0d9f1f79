"""What a server sees if it may choose the frozen model: weights that hand one patch to the head, and the way back.

For tests and teaching: sites that pin their backbone by a SHA-256 refuse such weights (``weights-hash``,
``policy-backbone``).

Shapes: D channels, p pixels a side of a patch, K classes.

Source: the idea of a server that plants a path from a patch to a trained layer is that of PEFTLeak (Sami et al., CVPR
2025, arXiv:2506.04453) and of Fowl et al., "Robbing the fed", ICLR 2022. Differences, all ours: plain weights of a
vision transformer instead of adapters as bins; one chosen patch; the head as the layer that leaks; features small
enough that AdamW's division by the size of a gradient does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confrere.errors import ConfigError

FLAG, ZERO = 0, 1
"""Channels that mark the chosen patch, and that are nothing, by which the layer norm is undone."""
HEIGHT, SHARP, QUIET = 100.0, 1e4, 1e-12
"""Of the mark; of the attention to it; of features: far below the 1e-8 that AdamW adds to the size of a gradient."""


def planted(weights: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """Return weights under which the class token's feature is one patch of the image, layer-normalised and quiet.

    Args:
        weights: of a ``ViTModel`` of transformers, by its names.
        patch: index of the patch, row by row.

    Raises:
        ConfigError: other names, or fewer than eight channels.
    """
    kernel = weights.get("embeddings.patch_embeddings.projection.weight")
    if kernel is None or "layers.0.attention.q_proj.weight" not in weights or len(kernel) < 8:
        what, fix = "these are no weights of a plain vision transformer", "give those of a transformers ViTModel"
        raise ConfigError(what, where="planted weights", fix=fix, code="audit")
    width, side = len(kernel), kernel.shape[-1]
    made = {name: torch.zeros_like(value) for name, value in weights.items()}
    for name, value in made.items():
        if "norm" in name and name.endswith("weight"):
            value.fill_(1.0)
    made["layernorm.weight"].fill_(QUIET)
    made["embeddings.patch_embeddings.projection.weight"][2:] = waves(side, width - 2).view(-1, 3, side, side)
    made["embeddings.position_embeddings"][0, 1 + patch, FLAG] = HEIGHT
    first = "layers.0.attention."
    heads = range(0, width, _head_dim(width))
    for row in heads:  # every head looks for the mark
        made[first + "q_proj.bias"][row] = SHARP
        made[first + "k_proj.weight"][row, FLAG] = 1.0
    for name in ("v_proj", "o_proj"):
        made[f"{first}{name}.weight"].copy_(torch.eye(width))
    return made


def _head_dim(width: int) -> int:
    """Return a stride that hits every head, whatever their number: one of a power of two or of a smaller divisor."""
    return next(d for d in (8, 4, 2, 1) if width % d == 0)


def waves(side: int, count: int) -> Tensor:
    """Return ``count`` orthonormal patterns (count, 3 p p) of a patch, the slowest first: cosines of each colour."""
    grid = np.cos(np.pi * (np.arange(side) + 0.5)[None] * np.arange(side)[:, None] / side)
    grid /= np.linalg.norm(grid, axis=1, keepdims=True)
    order = sorted((u + v, u, v, c) for u in range(side) for v in range(side) for c in range(3))[:count]
    found = np.zeros((count, 3, side, side))
    for index, (_, u, v, colour) in enumerate(order):
        found[index, colour] = np.outer(grid[u], grid[v])
    return torch.from_numpy(found.reshape(count, -1)).float()


def patch_of(feature: Tensor, side: int) -> NDArray[np.float64]:
    """Return the patch (3, p, p), normalised as the model's input, of a feature (D,) known up to a positive factor.

    A layer norm leaves a vector of size sqrt(D); the mark and the zero channel then give back what it took away.
    """
    width = len(feature)
    unit = feature.double() * width**0.5 / feature.double().norm()
    spread = HEIGHT / (unit[FLAG] - unit[ZERO])
    content = (unit[2:] - unit[ZERO]) * spread
    patch: NDArray[np.float64] = (content @ waves(side, width - 2).double()).view(3, side, side).numpy()
    return patch


def feature_of_class(change: Tensor, which: int, absent: int) -> Tensor:
    """Return the sum of the features (D,) of all images of a class, up to a positive factor, from the head's change.

    With a head of zeros every image adds ``f / K`` to the gradient of each row of ``change`` (K, D) and takes ``f``
    from that of its own class; the row of a class that nobody has takes the common part away. One image of its class:
    its feature, however many others there were and however many steps.
    """
    return change[which] - change[absent]

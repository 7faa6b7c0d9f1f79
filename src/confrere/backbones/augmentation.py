"""Two views of an image, cut, mirrored and coloured at random, for contrastive learning.

Own code, as torchvision's draws come from the global generator.

Shapes: B images (B, 3, H, W), normalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  as in PyTorch's own documentation

LEAST = 0.3
"""Least share of an image that a view shows."""
STRENGTH = 0.4
"""How far brightness, contrast and saturation may go, each way."""


def two_views(images: Tensor, chance: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return two views of each image, of its size; ``chance`` returns uniform numbers of its argument's shape.

    A view is a square of 0.3 to 1 of the area, in any place, mirrored left to right and upside down half of the time,
    with brightness, contrast and saturation changed by up to 0.4; half of the time it has no colours a fifth of it.
    """
    draws = chance(images.new_empty(len(images), 2, 9, dtype=torch.float32))
    return _view(images, draws[:, 0]), _view(images, draws[:, 1])


def _view(images: Tensor, draws: Tensor) -> Tensor:
    side = (LEAST + (1 - LEAST) * draws[:, 0]).sqrt()
    free = 1 - side
    x, y = free * (2 * draws[:, 1] - 1), free * (2 * draws[:, 2] - 1)
    mirrored, turned = 1 - 2 * (draws[:, 3] < 0.5).float(), 1 - 2 * (draws[:, 4] < 0.5).float()
    none = torch.zeros_like(side)
    rows = [torch.stack([side * mirrored, none, x], 1), torch.stack([none, side * turned, y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
    cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    brighter, harder, fuller = ((1 + STRENGTH * (2 * draws[:, k] - 1)).view(-1, 1, 1, 1).to(cut) for k in (5, 6, 7))
    fuller = torch.where(draws[:, 8].view(-1, 1, 1, 1) < 0.2, 0.0, fuller)
    grey = cut.mean(1, keepdim=True)
    coloured = grey + fuller * (cut - grey)
    middle = coloured.mean((1, 2, 3), keepdim=True)
    return (middle + harder * (coloured - middle)) * brighter

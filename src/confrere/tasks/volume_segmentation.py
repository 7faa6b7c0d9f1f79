"""A class for every voxel of a volume, by one linear layer on the network's last maps.

Shapes: B volumes of a batch, N volumes, K classes (0 is the background), D channels, X, Y and Z voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from confrere.adapters import head
from confrere.errors import ConfigError
from confrere.tasks.segmentation import Segmentation, dice_terms
from confrere.tasks.task import Objective
from confrere.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class VolumeSegmentation(Segmentation):
    """Segmentation of 3-D images, in patches while it trains.

    The network's last map says which voxels it looked at (1) and which not (0): outside there is no loss.
    """

    name = "volume-segmentation"
    title = "Segmentation of volumes"

    def init(self, outputs: int, features: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return a random head, as wide as PyTorch draws last layers; bias 0.

        The network below is trained from nothing, and with a head of zeros it learns much later.
        """
        return head.init(outputs, features, generator, std=(3 * features) ** -0.5)

    def apply(self, params: Tensors, features: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return scores, and where the network looked (B, K + 1, X, Y, Z), of maps (B, X, Y, Z, D + 1)."""
        weight, bias = (params[name].to(features.device) for name in head.NAMES)
        scores = nn.functional.linear(features[..., :-1], weight, bias)
        return torch.cat([scores, features[..., -1:]], -1).movedim(-1, 1)

    def objective(self, name: str, weights: Tensor | None = None) -> Objective:
        """Return soft Dice loss, cross-entropy over voxels, or their sum, of what the network looked at.

        Raises:
            ConfigError: class weights, which this task has not.
        """
        if weights is not None:
            raise ConfigError("voxels have no class weights", where="train.balance", fix='use "sampling" or "none"')

        def value(outputs: Tensor, masks: Tensor) -> Tensor:
            scores, seen = outputs[:, :-1], outputs[:, -1]
            loss = scores.new_zeros(())
            if name != "cross-entropy":
                loss = loss + dice_terms(scores.softmax(1) * seen[:, None], masks.long() * seen.long()).mean()
            if name != "dice":
                each = nn.functional.cross_entropy(scores, masks.long(), reduction="none")
                loss = loss + (each * seen).sum() / seen.sum()
            return loss

        return value

    def chances(self, outputs: Tensor, temperature: float) -> np.ndarray:
        """Return probabilities (B, K, X, Y, Z)."""
        return np.asarray(outputs[:, :-1].double().softmax(1))

    def pack(self, outputs: Tensor) -> Tensor:
        """Return probabilities (B, K, X, Y, Z) in half precision."""
        return outputs[:, :-1].softmax(1).half()

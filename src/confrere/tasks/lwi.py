"""Learnable weight initialisation (LWI): what a network can learn of volumes without labels.

The pretext task itself is :mod:`confrere.pretext.lwi`; the network computes its losses
(:mod:`confrere.backbones.volume_pretraining`).

Shapes: N volumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from confrere.pretext.lwi import Lwi
from confrere.tasks.pretext import Pretext


@dataclass(frozen=True, kw_only=True)
class LearnableInitialisation(Lwi, Pretext):
    """Tell where shuffled slabs of a volume came from, and draw its masked cubes; options: :class:`Lwi`.

    Outputs are (B, 4) of each volume: the loss; the share of slabs told right, a mean over order heads; the mean
    squared error of the reconstruction over all voxels; and that of who draws all voxels in their mean.

    References:
        Kumar et al., Learnable Weight Initialization for Volumetric Medical Image Segmentation, arXiv 2306.09320.
    """

    name = "lwi"
    title = "Learnable weight initialisation"
    measures: ClassVar[dict[str, str]] = {"told": "Slabs told right", "rebuilt": "Explained share of what is rebuilt"}
    where = "task"

    def outputs(self, classes: int) -> int:
        """Return 4."""
        return 4

    def worth(self, outputs: Tensor) -> np.ndarray:
        """Return the share of slabs told right; 1 / slabs by chance."""
        return np.asarray(outputs[:, 1].double().numpy())

    def numbers(self, outputs: Tensor) -> tuple[np.ndarray, ...]:
        """Return the share of slabs told right, and 1 - error / error of the mean, 0 where that is less."""
        _, told, error, control = outputs.double().numpy().T
        return told, np.clip(1 - error / np.maximum(control, 1e-12), 0.0, 1.0)

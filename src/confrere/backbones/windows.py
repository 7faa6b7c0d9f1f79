"""Windows through which a network looks at volumes: one of each to train on, many to see it whole.

Shapes: B volumes of X x Y x Z voxels, C channels, D channels of the last maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from confrere.adapters.dropout import Chance
from confrere.backbones.anatomy import Anatomy
from confrere.data.patches import Size, place, sliding


class Windowed(nn.Module):
    """A network that trains on one random window of each volume, and looks at a whole one through many.

    Attributes:
        window: voxels along X, Y, Z.
        masks, share: of the volumes of a training step, see :func:`centred`.
    """

    def __init__(self, net: nn.Module, window: Size) -> None:
        super().__init__()
        self.net, self.window, self.chance = net, window, Chance()
        self.masks: Tensor | None = None
        self.share = 0.0

    def forward(self, volumes: Tensor) -> Tensor:
        """Return the last maps, and 1 where the network looked (B, X, Y, Z, D + 1), of volumes (B, X, Y, Z, 1)."""
        inputs = volumes.movedim(-1, 1)
        if tuple(inputs.shape[2:]) == self.window:
            maps, seen = self.net(inputs), inputs.new_ones(len(inputs), 1, *self.window)
        elif self.chance.generator is None:
            maps = sliding(self.net, inputs, self.window, overlap=0.25, batch_size=4)
            seen = maps.new_ones(len(maps), 1, *maps.shape[2:])
        else:
            maps, seen = self._somewhere(inputs)
        return torch.cat([maps, seen], 1).movedim(1, -1)

    def _somewhere(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        places = somewhere(inputs, self.window, self.chance, self.masks, self.share)
        found = self.net(torch.stack([volume[(slice(None), *cut)] for volume, cut in zip(inputs, places, strict=True)]))
        maps = found.new_zeros(len(inputs), found.shape[1], *inputs.shape[2:])
        seen = found.new_zeros(len(inputs), 1, *inputs.shape[2:])
        for row, cut in enumerate(places):
            maps[(row, slice(None), *cut)] = found[row]
            seen[(row, slice(None), *cut)] = 1
        return maps, seen


def somewhere(
    inputs: Tensor, window: Size, chance: Chance, masks: Tensor | None = None, share: float = 0.0
) -> list[tuple[slice, ...]]:
    """Return a place for one window in each of volumes (B, C, X, Y, Z), every place as likely as any other.

    With ``masks`` (B, X, Y, Z) a ``share`` of them lies around the foreground, see
    :func:`confrere.data.patches.draw_patches`.
    """
    each = 3 if masks is None else 5
    draws = chance(inputs.new_empty(len(inputs), each, dtype=torch.float32)).tolist()
    labels = [None] * len(inputs) if masks is None else masks
    return [place(window, inputs.shape[2:], row, label, share) for row, label in zip(draws, labels, strict=True)]


@contextmanager
def centred(anatomy: Anatomy, masks: Tensor, share: float) -> Iterator[None]:
    """Let training windows inside the ``with`` block, of the calling thread's network, lie around the foreground.

    Args:
        anatomy: of a backbone that looks through windows; of any other, if ``share`` is 0.
        masks: (B, X, Y, Z) integers, 0 the background, of the volumes that are looked at.
        share: chance that a window is centred on a random voxel of the foreground, as near as the borders let it. A
            volume without any foreground is looked at anywhere.
    """
    root = anatomy.root
    if not (share and isinstance(root, Windowed)):
        yield
        return
    root.masks, root.share = masks, share
    try:
        yield
    finally:
        root.masks, root.share = None, 0.0

"""Pieces of volumes: random ones to train on, overlapping ones to look at a whole volume.

Shapes: B volumes (B, C, X, Y, Z), their labels (B, X, Y, Z), 0 the background.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from confrere.errors import ConfigError

Size = tuple[int, int, int]


def draw_patches(
    volumes: Tensor, labels: Tensor, size: Size, generator: torch.Generator, foreground: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Cut one patch out of each volume.

    Args:
        volumes: (B, C, X, Y, Z).
        labels: (B, X, Y, Z), integers.
        size: voxels of a patch along X, Y, Z; at most those of a volume.
        generator: draws; its state after the call depends on the number of volumes alone, not on their labels.
        foreground: chance that a patch has a random voxel of the foreground at its centre, or as near to it as the
            borders let it; where there is no foreground, and else, every place is as likely as any other.

    Returns:
        Patches (B, C, *size) and their labels (B, *size).

    Raises:
        ConfigError: a patch is larger than the volumes, or ``foreground`` is no probability.
    """
    whole = volumes.shape[2:]
    if not all(0 < side <= there for side, there in zip(size, whole, strict=True)):
        raise ConfigError(f"patches of {_text(size)} voxels do not fit volumes of {_text(whole)}", where="patch size")
    if not 0 <= foreground <= 1:
        raise ConfigError("foreground must be 0 to 1", where="foreground")
    draws = torch.rand(len(volumes), 5, generator=generator, dtype=torch.float64)
    patches, kept = [], []
    for volume, label, row in zip(volumes, labels, draws.tolist(), strict=True):
        cut = place(size, whole, row, label, foreground)
        patches.append(volume[(slice(None), *cut)])
        kept.append(label[cut])
    return torch.stack(patches), torch.stack(kept)


def place(
    size: Size, whole: Sequence[int], draws: Sequence[float], label: Tensor | None = None, foreground: float = 0.0
) -> tuple[slice, ...]:
    """Return where a patch of ``size`` voxels is cut out of a volume of ``whole`` voxels.

    Args:
        size: along X, Y, Z.
        whole: the same, at least ``size``.
        draws: in [0, 1): whether and on which voxel of the foreground the patch is centred, and where it is otherwise
            along X, Y, Z. The first two may be left out without ``label``.
        label: (X, Y, Z), integers; None: every place is as likely as any other.
        foreground: chance of the first, see :func:`draw_patches`.
    """
    room = [there - side + 1 for there, side in zip(whole, size, strict=True)]
    start = [int(part * free) for part, free in zip(draws[-3:], room, strict=True)]
    inside = torch.nonzero(label) if label is not None and draws[0] < foreground else ()
    if len(inside):
        voxel = inside[int(draws[1] * len(inside))].tolist()
        near = (at - side // 2 for at, side in zip(voxel, size, strict=True))
        start = [min(max(0, at), free - 1) for at, free in zip(near, room, strict=True)]
    return tuple(slice(at, at + side) for at, side in zip(start, size, strict=True))


def sliding(
    net: Callable[[Tensor], Tensor], volumes: Tensor, size: Size, overlap: float = 0.5, batch_size: int = 1
) -> Tensor:
    """Return the scores (B, K, X, Y, Z) of whole volumes, a weighted mean over windows that overlap.

    A window weighs as a Gaussian with an eighth of its edge. The numbers are those of MONAI's
    ``sliding_window_inference(mode="gaussian")``, which would take ten seconds to import.

    Args:
        net: from (n, C, *size) to (n, K, *size).
        volumes: (B, C, X, Y, Z); padded with their least value, evenly, where they are smaller than a window.
        size: voxels of a window along X, Y, Z.
        overlap: share of a window that the next one covers, 0 to below 1.
        batch_size: windows that pass through the network at once.

    Raises:
        ConfigError: ``overlap`` is out of range.
    """
    if not 0 <= overlap < 1:
        raise ConfigError("overlap must be 0 to below 1", where="overlap")
    short = [max(0, side - there) for side, there in zip(size, volumes.shape[2:], strict=True)]
    edges = [edge for lack in reversed(short) for edge in (lack // 2, lack - lack // 2)]
    padded = pad(volumes, edges, value=float(volumes.min())) if any(short) else volumes
    whole = padded.shape[2:]
    starts = [_starts(side, window, overlap) for side, window in zip(whole, size, strict=True)]
    windows = [(row, at) for row in range(len(volumes)) for at in itertools.product(*starts)]
    weight = _bell(size).to(volumes)
    total: Tensor | None = None
    mass = volumes.new_zeros(len(volumes), 1, *whole)
    with torch.no_grad():
        for begin in range(0, len(windows), batch_size):
            places = [_place(*window, size) for window in windows[begin : begin + batch_size]]
            scores = net(torch.stack([padded[place] for place in places]))
            if total is None:
                total = scores.new_zeros(len(volumes), scores.shape[1], *whole)
            for place, score in zip(places, scores, strict=True):
                total[place] += score * weight
                mass[place] += weight
    if total is None:
        raise ConfigError("there is no volume", where="sliding")
    middle = tuple(slice(lack // 2, lack // 2 + there) for lack, there in zip(short, volumes.shape[2:], strict=True))
    return (total / mass)[(slice(None), slice(None), *middle)]


def _place(row: int, start: Sequence[int], size: Size) -> tuple[int | slice, ...]:
    return (row, slice(None), *(slice(at, at + side) for at, side in zip(start, size, strict=True)))


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """Return where windows begin along an axis; the last one ends with the volume."""
    step = max(1, int(window * (1 - overlap)))
    return sorted({min(at, side - window) for at in range(0, side - window + step, step)})


def _bell(size: Size) -> Tensor:
    """Return the weights (*size) of a window, 1 in its middle."""
    weight = torch.ones(())
    for side in size:
        x = torch.arange(side) - (side - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (x / (side / 8)) ** 2)
    return weight.clamp_min(1e-3)


def _text(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))

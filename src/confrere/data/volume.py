"""Volumes for networks: NIfTI files and DICOM series in one orientation, their labels, and what a network sees.

Rules: axes run to the patient's right, front and head (RAS+), lengths are millimetres, values are float32 after the
file's own rescaling. What cannot be placed in space without a guess is refused: :mod:`~confrere.data.nifti` and
:mod:`~confrere.data.series` read, :mod:`~confrere.data.grid` turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.data.decode import BadImageError, refusal
from confrere.data.grid import NONFINITE, Placed, distance, oriented, spacing_of
from confrere.data.nifti import read_nifti
from confrere.data.series import read_series

MAX_VOXELS = 100_000_000
MAX_OBLIQUE = 20.0  # degrees

CONSTANT = "the same value everywhere"
NOT_WHOLE = "a label is not a whole number"
UNKNOWN_LABEL = "a label is not one of the classes"
OTHER_GRID = "labels and image are not on the same grid"
LABEL_FOLDER = "labels must be a NIfTI file"


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume in RAS+ orientation.

    Attributes:
        voxels: (X, Y, Z) float32, finite; X runs to the right, Y to the front, Z to the head.
        spacing: millimetres between voxels along X, Y, Z.
        affine: (4, 4) float64, from voxel indices to millimetres.
        stored_affine: the same for the voxels in the order of axes that the file has; of a series: columns, rows, and
            slices along their normal.
        sha256: of the file's bytes; of a folder: of the sorted digests of its slices. Hexadecimal.
    """

    voxels: NDArray[np.float32]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    stored_affine: NDArray[np.float64]
    sha256: str


def read_volume(path: Path, *, max_voxels: int = MAX_VOXELS, max_oblique: float = MAX_OBLIQUE) -> Volume:
    """Read ``.nii``, ``.nii.gz`` (told by its bytes, not its name) or a folder with the slices of one DICOM series.

    Args:
        path: a file or a folder.
        max_voxels: volumes of more are refused before they are read.
        max_oblique: degrees that an axis may be off the body's axis which it is taken for.

    Raises:
        BadImageError: with a reason of this module, or of those it reads with.
        MissingExtraError: nibabel or pydicom is not installed.
    """
    placed = _read(path, max_voxels)
    voxels, affine = oriented(placed, max_oblique)
    if not np.isfinite(voxels).all():
        raise BadImageError(NONFINITE)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(voxels, dtype=np.float32)
    if not np.isfinite(values).all():
        raise BadImageError(NONFINITE)
    if values.min() == values.max():
        raise BadImageError(CONSTANT)
    return Volume(
        voxels=values,
        spacing=spacing_of(affine),
        affine=affine,
        stored_affine=placed.affine,
        sha256=placed.sha256,
    )


def read_labels(path: Path, classes: int, like: Volume, *, max_voxels: int = MAX_VOXELS) -> NDArray[np.uint8]:
    """Read the labels (X, Y, Z) uint8 of a volume from a NIfTI file, in the orientation of ``like``.

    Args:
        path: a file whose values are whole numbers, of whichever type.
        classes: values are 0 .. classes - 1; at most 256.
        like: the image; the labels must lie on its grid, stored in whichever order of axes.
        max_voxels: as in :func:`read_volume`.

    Raises:
        BadImageError, MissingExtraError: as :func:`read_volume`.
    """
    if path.is_dir():
        raise BadImageError(LABEL_FOLDER)
    # Whatever was allowed of the image is allowed here: the grid must be the same.
    voxels, affine = oriented(_read(path, max_voxels), 45.0)
    if voxels.shape != like.voxels.shape or distance(affine, like.affine, voxels.shape) > 0.05 * min(like.spacing):
        raise BadImageError(OTHER_GRID)
    if not np.isfinite(voxels).all():
        raise BadImageError(NONFINITE)
    if (voxels != np.floor(voxels)).any():
        raise BadImageError(NOT_WHOLE)
    if voxels.min() < 0 or voxels.max() >= min(classes, 256):
        raise BadImageError(UNKNOWN_LABEL)
    return np.ascontiguousarray(voxels, dtype=np.uint8)


def prepared(volume: Volume, spacing: tuple[float, float, float], size: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return the voxels (size) that a network sees: normalised, resampled, cut or padded at the centre.

    Values are clipped to the 0.5 and 99.5 percentiles of the volume's non-zero voxels, then shifted and scaled so that
    these have mean 0 and variance 1. The same straight line maps all voxels, zeros too: zero is the background of a
    stripped brain but a dark voxel of an ordinary picture, and must stay darker than its neighbours. Nothing is pooled
    over volumes. Resampling is linear, without a filter before it; padding is as dark as the darkest voxel.

    Args:
        volume: what :func:`read_volume` gave.
        spacing: millimetres between voxels along each axis.
        size: voxels along each axis.

    Raises:
        BadImageError: the non-zero voxels have the same value everywhere, once clipped.
    """
    known = volume.voxels[volume.voxels != 0]
    low, high = np.percentile(known, [0.5, 99.5])
    middle = np.clip(known, low, high)
    mean, std = float(middle.mean(dtype=np.float64)), float(middle.std(dtype=np.float64))
    if not std > 1e-6 * max(abs(float(low)), abs(float(high))):  # less is rounding of float32
        raise BadImageError(CONSTANT)
    values = ((np.clip(volume.voxels, low, high) - mean) / std).astype(np.float32)
    return _resampled(values, volume.spacing, spacing, size, order=1, pad=float(values.min()))


def prepared_labels(
    labels: NDArray[np.uint8],
    old: tuple[float, float, float],
    spacing: tuple[float, float, float],
    size: tuple[int, int, int],
) -> NDArray[np.uint8]:
    """Return labels (size) on the grid of :func:`prepared`, each that of the nearest voxel; padding is background.

    ``old`` is the spacing that the labels have, that of their volume.
    """
    return _resampled(labels, old, spacing, size, order=0, pad=0)


def restored(
    labels: NDArray[np.uint8],
    shape: tuple[int, ...],
    old: tuple[float, float, float],
    spacing: tuple[float, float, float],
) -> tuple[NDArray[np.uint8], int]:
    """Return labels of the grid of :func:`prepared` on a volume's own grid (shape), each that of the nearest voxel.

    What the grid cut off is background; the second number is how many voxels that are. ``old`` is the spacing of the
    volume, ``spacing`` that of the grid.
    """
    inside = []
    for n, before, after, size in zip(shape, old, spacing, labels.shape, strict=True):
        there = max(1, round(n * before / after))
        at = (np.arange(n) - (n - 1) / 2) * before / after + (there - 1) / 2 + (size - there) // 2
        inside.append(np.clip(np.floor(at + 0.5).astype(np.int64) + 1, 0, size + 1))
    seen = [int(((at > 0) & (at <= size)).sum()) for at, size in zip(inside, labels.shape, strict=True)]
    return np.ascontiguousarray(np.pad(labels, 1)[np.ix_(*inside)]), math.prod(shape) - math.prod(seen)


def _resampled(
    values: NDArray[Any],
    old: tuple[float, float, float],
    new: tuple[float, float, float],
    size: tuple[int, int, int],
    *,
    order: int,
    pad: float,
) -> NDArray[Any]:
    """Return ``values`` on a grid with the same centre, and of that grid the middle.

    The new grid has round(n old / new) voxels along an axis, so that an unchanged spacing changes no value.
    """
    from scipy.ndimage import affine_transform

    steps, offsets, into = [], [], []
    for n, before, after, want in zip(values.shape, old, new, size, strict=True):
        there = max(1, round(n * before / after))
        start = (want - there) // 2
        low, high = max(0, start), min(want, start + there)
        steps.append(after / before)
        offsets.append((n - 1) / 2 + (low - start - (there - 1) / 2) * steps[-1])
        into.append(slice(low, high))
    result = np.full(size, pad, dtype=values.dtype)
    shape = tuple(part.stop - part.start for part in into)
    result[tuple(into)] = affine_transform(values, np.diag(steps), offsets, shape, order=order, mode="nearest")
    return result


def _read(path: Path, max_voxels: int) -> Placed:
    try:
        return read_series(path, max_voxels) if path.is_dir() else read_nifti(path, max_voxels)
    except OSError as error:
        raise BadImageError(refusal(error)) from error

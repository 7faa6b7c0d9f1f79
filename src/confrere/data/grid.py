"""How voxels lie in space: affines, and the turn into RAS+ orientation (right, front, head).

Tolerances: spacing 0.01 to 100 mm; axes at right angles within 0.6 degrees.
"""

from __future__ import annotations

import gzip
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from confrere.data.decode import BadImageError
from confrere.errors import MissingExtraError

SPACINGS_MM = (0.01, 100.0)
SHEAR = 0.01  # cosine between two axes
BESIDE = 16_000_000  # bytes that a file may hold before its first voxel
MADE_HERE = b"labels by confrere predict"
"""By which a file of labels is known as ours: its description, :data:`DESCRIPTION` of its NIfTI-1 header."""
DESCRIPTION = slice(148, 228)

LARGE = "more voxels than max_voxels"
DIMENSIONS = "not three dimensions of two voxels or more"
SPACING = "spacing is zero, not finite or absurd"
SHEARED = "axes are not at right angles"
OBLIQUE = "axes are too oblique"
TRUNCATED = "cut short"
TRAILING = "more bytes than its voxels need"
NONFINITE = "a value is not finite"


class Placed(NamedTuple):
    """Voxels (X, Y, Z) in any orientation and type, their affine (4, 4), SHA-256."""

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    sha256: str


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the millimetres between voxels along each axis of an affine (4, 4)."""
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def distance(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return how far apart two affines put a corner of the volume, in millimetres."""
    corners = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape), 1]
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def oriented(placed: Placed, max_oblique: float) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return voxels and affine in RAS+ orientation: axes are swapped and flipped, nothing is interpolated.

    Raises:
        BadImageError: spacing, right angles, or more than ``max_oblique`` degrees between an axis and the body's.
    """
    affine = placed.affine
    spacing = spacing_of(affine)
    if not np.isfinite(affine).all() or not all(SPACINGS_MM[0] <= length <= SPACINGS_MM[1] for length in spacing):
        raise BadImageError(SPACING)
    axes = affine[:3, :3] / spacing
    if abs(axes.T @ axes - np.eye(3)).max() > SHEAR:
        raise BadImageError(SHEARED)
    if math.degrees(math.acos(min(1.0, float(abs(axes).max(axis=0).min())))) > max_oblique:
        raise BadImageError(OBLIQUE)
    turn = load_nibabel().orientations
    how = turn.io_orientation(affine)
    return turn.apply_orientation(placed.voxels, how), affine @ turn.inv_ornt_aff(how, placed.voxels.shape)


def as_stored(voxels: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """Return voxels of RAS+ orientation in the order of axes that ``affine`` has: :func:`oriented`, undone."""
    turn = load_nibabel().orientations
    back = turn.ornt_transform(turn.axcodes2ornt("RAS"), turn.io_orientation(affine))
    return np.asarray(turn.apply_orientation(voxels, back))


def load_nibabel() -> Any:
    """Return nibabel; MissingExtraError when it is not installed."""
    try:
        import nibabel
    except ImportError as error:
        raise MissingExtraError("nibabel", "volumes", needed_for="a volume") from error
    return nibabel


def nifti_bytes(labels: NDArray[np.uint8], affine: NDArray[np.float64]) -> bytes:
    """Return labels (X, Y, Z) as a gzipped NIfTI file: lengths in millimetres, and that it was made here.

    Raises:
        MissingExtraError: nibabel is not installed.
    """
    nibabel = load_nibabel()
    image = nibabel.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = MADE_HERE
    return gzip.compress(image.to_bytes(), mtime=0)

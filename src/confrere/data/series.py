"""Folders of DICOM slices: one series as a stack of voxels, or the reason why not.

Only tags that place and scale voxels are read, and nothing is logged. Gaps between slices must lie within a tenth of
their median. A slice that is missing at either end cannot be noticed; one between can.
"""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from confrere import intake
from confrere.data.decode import DAMAGED, HEAVY, SPECIAL, BadImageError
from confrere.data.grid import BESIDE, DIMENSIONS, LARGE, SHEAR, TRAILING, TRUNCATED, Placed
from confrere.errors import MissingExtraError

MOST_SLICES = 10_000

NOT_DICOM = "a file that is not DICOM among the slices"
SERIES = "several series in one folder"
REFERENCE = "several frames of reference"
ORIENTATIONS = "slices of several orientations"
SIZES = "slices of several sizes"
RESOLUTIONS = "slices of several pixel spacings"
NO_POSITION = "no ImagePositionPatient"
NO_ORIENTATION = "no usable ImageOrientationPatient"
NO_SPACING = "no usable PixelSpacing"
NO_PIXELS = "no pixels"
FRAMES = "several frames in one file"
COLOUR = "not MONOCHROME2"
DEFLATED = "a deflated file"
DUPLICATE = "two slices at one position"
GAPS = "missing slices, or unequal gaps"
SHIFTED = "slices are shifted against each other"
CODEC = "no decoder installed for"  # followed by the name of the standard's transfer syntax

# Everything of a slice that is read.
# fmt: off
_TAGS = [
    "SeriesInstanceUID", "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "PixelData",
]
# fmt: on
_DEFLATED_SYNTAX = b"1.2.840.10008.1.2.1.99"


class _Slice(NamedTuple):
    """What of a DICOM file is used; lengths in millimetres."""

    series: str
    reference: str
    axes: NDArray[np.float64]  # (2, 3) from one column, from one row to the next
    position: NDArray[np.float64]  # (3,) of the first pixel, to the left, back and head
    pixels: NDArray[np.float32]  # (rows, columns)
    sha256: str


def read_series(folder: Path, max_voxels: int) -> Placed:
    """Read the slices in a folder, which may also hold hidden files and a DICOMDIR.

    Raises:
        OSError: a file cannot be opened.
        BadImageError: with one of this module's reasons, or those of ``grid`` and ``decode``.
    """
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "DICOMDIR")
    if len(paths) < 2:
        raise BadImageError(DIMENSIONS)
    if any(path.is_symlink() for path in paths):
        raise BadImageError(SPECIAL)
    if len(paths) > MOST_SLICES:
        raise BadImageError(LARGE)
    if sum(path.stat().st_size for path in paths) > max_voxels * 8 + BESIDE:
        raise BadImageError(HEAVY)
    most = max_voxels // len(paths)
    slices = [_read_slice(paths[0], most)]
    for path in paths[1:]:
        slices.append(_read_slice(path, most))
        _check_alike(slices[0], slices[-1])
    affine, order = _stacked(slices)
    voxels = np.stack([slices[k].pixels.T for k in order], axis=2)
    sha256 = hashlib.sha256("\n".join(sorted(one.sha256 for one in slices)).encode()).hexdigest()
    return Placed(voxels, affine, sha256)


def _check_alike(one: _Slice, other: _Slice) -> None:
    if one.series != other.series:
        raise BadImageError(SERIES)
    if one.reference != other.reference:
        raise BadImageError(REFERENCE)
    if one.pixels.shape != other.pixels.shape:
        raise BadImageError(SIZES)
    lengths = np.linalg.norm([one.axes, other.axes], axis=2)
    if abs(lengths[0] - lengths[1]).max() > 1e-3 * lengths[0].min():
        raise BadImageError(RESOLUTIONS)
    if abs(one.axes - other.axes).max() > 2e-3 * lengths[0].max():
        raise BadImageError(ORIENTATIONS)


def _stacked(slices: list[_Slice]) -> tuple[NDArray[np.float64], list[int]]:
    """Return the affine (to the right, front and head) and the order of the slices along their normal."""
    axes, positions = slices[0].axes, np.array([one.position for one in slices])
    normal = np.cross(*axes)
    along = positions @ (normal / np.linalg.norm(normal))
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    median = float(np.median(gaps))
    if gaps.min() < max(0.1 * median, 1e-3):
        raise BadImageError(DUPLICATE)
    if abs(gaps - median).max() > 0.1 * median:
        raise BadImageError(GAPS)
    placed = positions[order]
    step = (placed[-1] - placed[0]) / (len(slices) - 1)
    off = placed - placed[0] - np.arange(len(slices))[:, None] * step
    if np.linalg.norm(off, axis=1).max() > 0.5 * median:
        raise BadImageError(SHIFTED)
    affine = np.eye(4)
    affine[:3] = np.stack([*axes, step, placed[0]], axis=1)
    affine[:2] *= -1  # DICOM counts to the left and to the back
    return affine, [int(k) for k in order]


def _read_slice(path: Path, most: int) -> _Slice:
    data = intake.read_bytes(path, most * 8 + BESIDE)
    if data[128:132] != b"DICM":
        raise BadImageError(NOT_DICOM)
    if _DEFLATED_SYNTAX in data:  # pydicom would inflate it without a limit
        raise BadImageError(DEFLATED)
    pydicom = _pydicom()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote values
            found = pydicom.dcmread(io.BytesIO(data), specific_tags=_TAGS)
            return _taken(found, most, hashlib.sha256(data).hexdigest())
    except (BadImageError, MissingExtraError):
        raise
    except Exception as error:  # pydicom and its decoders raise a dozen types
        raise BadImageError(DAMAGED) from error


def _taken(found: Any, most: int, sha256: str) -> _Slice:
    if int(found.get("NumberOfFrames") or 1) != 1:
        raise BadImageError(FRAMES)
    if "PixelData" not in found:
        raise BadImageError(NO_PIXELS)
    if found.get("SamplesPerPixel") != 1 or found.get("PhotometricInterpretation") != "MONOCHROME2":
        raise BadImageError(COLOUR)
    rows, columns = int(found.Rows), int(found.Columns)
    if rows * columns > most:
        raise BadImageError(LARGE)
    position = _numbers(found, "ImagePositionPatient", 3, NO_POSITION)
    axes = _numbers(found, "ImageOrientationPatient", 6, NO_ORIENTATION).reshape(2, 3)
    if abs(axes @ axes.T - np.eye(2)).max() > SHEAR:
        raise BadImageError(NO_ORIENTATION)
    spacing = _numbers(found, "PixelSpacing", 2, NO_SPACING)  # from row to row, from column to column
    if spacing.min() <= 0:
        raise BadImageError(NO_SPACING)
    return _Slice(
        series=str(found.get("SeriesInstanceUID", "")),
        reference=str(found.get("FrameOfReferenceUID", "")),
        axes=axes * spacing[::-1, None],
        position=position,
        pixels=_pixels(found, rows * columns),
        sha256=sha256,
    )


def _numbers(found: Any, tag: str, count: int, reason: str) -> NDArray[np.float64]:
    try:
        values = np.array([float(value) for value in found.get(tag)], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadImageError(reason) from error
    if len(values) != count or not np.isfinite(values).all():
        raise BadImageError(reason)
    return values


def _pixels(found: Any, count: int) -> NDArray[np.float32]:
    """Return the rescaled pixels (rows, columns)."""
    from pydicom.pixels import apply_modality_lut, get_decoder

    syntax = found.file_meta.TransferSyntaxUID
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise BadImageError(f"{CODEC} a private transfer syntax")
    if syntax.is_encapsulated:
        try:
            ready = get_decoder(syntax).is_available
        except NotImplementedError:
            ready = False
        if not ready:
            raise BadImageError(f"{CODEC} {syntax.name}")
    else:
        length, there = count * int(found.BitsAllocated) // 8, len(found.PixelData)
        if not length <= there <= length + length % 2:
            raise BadImageError(TRUNCATED if there < length else TRAILING)
    with np.errstate(over="ignore"):
        return np.asarray(apply_modality_lut(found.pixel_array, found)).astype(np.float32)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtraError("pydicom", "volumes", needed_for="a folder of DICOM slices") from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # what it logs quotes values
    return pydicom

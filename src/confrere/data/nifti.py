"""NIfTI files: voxels and affine as they are stored, or the reason why not.

Sizes come from the header before any voxel; a gzip file is inflated no further than its header needs. Header
extensions, which may hold a patient's name, are skipped. Where qform and sform are both given they must put every
corner within half a voxel of each other.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere import intake
from confrere.data.decode import DAMAGED, EMPTY, HEAVY, BadImageError
from confrere.data.grid import (
    BESIDE,
    DIMENSIONS,
    LARGE,
    NONFINITE,
    SPACING,
    TRAILING,
    TRUNCATED,
    Placed,
    distance,
    load_nibabel,
    spacing_of,
)

FOREIGN = "not a NIfTI file"
PAIR = "header and voxels in two files"
SEVERAL = "several volumes in one file"
KIND = "voxel type not supported"
UNITS = "lengths are not in millimetres"
UNPLACED = "no orientation in the header"
DISAGREE = "qform and sform disagree"


def read_nifti(path: Path, max_voxels: int) -> Placed:
    """Read a ``.nii`` or ``.nii.gz`` file, told by its bytes.

    Raises:
        OSError: it cannot be opened.
        BadImageError: with one of this module's reasons, or those of ``grid`` and ``decode``.
    """
    with intake.open_file(path) as file:
        head, total = file.read(65_536), os.fstat(file.fileno()).st_size
        packed = head.startswith(b"\x1f\x8b")
        header = _header(_inflated(head, 540) if packed else head)
        shape, kind, offset = _layout(header, max_voxels)
        count = math.prod(shape)
        length = offset + count * kind.itemsize
        if packed and total > length + length // 100 + 65_536:
            raise BadImageError(HEAVY)
        if not packed and total != length:
            raise BadImageError(TRUNCATED if total < length else TRAILING)
        data = head + file.read(total)
    body = _inflated(data, length + 1) if packed else data
    if len(body) != length:
        raise BadImageError(TRUNCATED if len(body) < length else TRAILING)
    voxels = np.frombuffer(body, kind, count, offset).reshape(shape, order="F")
    return Placed(_scaled(voxels, header), _affine(header, shape), hashlib.sha256(data).hexdigest())


def _inflated(data: bytes, most: int) -> bytes:
    """Return up to ``most`` bytes of a gzip file; its checksum holds where it has fewer."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(most)
    except EOFError as error:
        raise BadImageError(TRUNCATED) from error
    except gzip.BadGzipFile as error:  # a wrong checksum or header, or something else where another part should begin
        raise BadImageError(TRAILING if str(error).startswith("Not a gzipped") else DAMAGED) from error
    except zlib.error as error:
        raise BadImageError(DAMAGED) from error


def _header(head: bytes) -> Any:
    """Return nibabel's header; unchecked, since its checks mend in silence and write to the log."""
    if not head:
        raise BadImageError(EMPTY)
    nibabel = load_nibabel()
    for cls in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        length = cls.template_dtype.itemsize
        sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
        if len(head) >= length and length in sizes:
            header = cls(head[:length], check=False)
            magic = bytes(header["magic"])[:3]
            if magic == cls.pair_magic[:3]:
                raise BadImageError(PAIR)
            if magic == cls.single_magic[:3]:
                return header
    raise BadImageError(FOREIGN)


def _layout(header: Any, max_voxels: int) -> tuple[tuple[int, int, int], np.dtype[Any], int]:
    """Return shape, type and the offset of the first voxel."""
    dims = [int(n) for n in header["dim"]]
    if not 3 <= dims[0] <= 7 or min(dims[1:4]) < 2:
        raise BadImageError(DIMENSIONS)
    if any(n != 1 for n in dims[4 : dims[0] + 1]):
        raise BadImageError(SEVERAL)
    if math.prod(dims[1:4]) > max_voxels:
        raise BadImageError(LARGE)
    try:
        kind = np.dtype(header.get_data_dtype())
    except Exception as error:  # codes that nibabel does not know
        raise BadImageError(KIND) from error
    if kind.kind not in "uif" or kind.itemsize > 8:  # colours are records, complex numbers have no order
        raise BadImageError(KIND)
    offset = float(header["vox_offset"])
    least = 4 + header.template_dtype.itemsize
    if not least <= offset <= BESIDE or offset != int(offset):
        raise BadImageError(DAMAGED)
    if int(header["xyzt_units"]) & 7 not in (0, 2):
        raise BadImageError(UNITS)
    return (dims[1], dims[2], dims[3]), kind, int(offset)


def _scaled(voxels: NDArray[Any], header: Any) -> NDArray[Any]:
    """Return slope * voxels + intercept; a slope of zero or NaN means that there is none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope) or (slope, intercept) == (1, 0):
        return voxels
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise BadImageError(NONFINITE)
    with np.errstate(over="ignore", invalid="ignore"):
        return voxels.astype(np.float64) * slope + intercept


def _affine(header: Any, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    if header["pixdim"][0] == 0:  # the standard reads it as 1
        header["pixdim"][0] = 1
    if not (header["pixdim"][1:4] > 0).all():
        raise BadImageError(SPACING)
    try:
        given = [header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]]
    except Exception as error:  # a quaternion longer than 1
        raise BadImageError(DAMAGED) from error
    placed = [np.asarray(one, dtype=np.float64) for one in given if one is not None]
    if not placed:
        raise BadImageError(UNPLACED)
    if not all(np.isfinite(one).all() for one in placed):
        raise BadImageError(SPACING)
    if len(placed) == 2 and distance(placed[0], placed[1], shape) > 0.5 * min(spacing_of(placed[0])):
        raise BadImageError(DISAGREE)
    return placed[0]

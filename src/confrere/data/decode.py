"""One file's bytes to one RGB picture, by fixed rules, or the reason why not.

Rules: the format is what the first bytes say (PNG, JPEG, TIFF; DICOM has rules of its own, see
:mod:`confrere.data.dicom`); the size is read from the header before any pixel; EXIF rotation is applied; 16-bit grey
keeps its full range, 0..65535 to 0..255; alpha is laid over black; palettes, grey, CMYK and YCbCr become RGB; colour
profiles are ignored; several frames are refused.
"""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from confrere import intake

# The plug-ins are called directly: Image.open would try others and warn instead of refuse large headers.
_FORMATS: tuple[tuple[bytes, str, type[ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
    (b"\xff\xd8\xff", "JPEG", JpegImageFile),
    (b"II*\x00", "TIFF", TiffImageFile),
    (b"MM\x00*", "TIFF", TiffImageFile),
)
_DIRECT = frozenset({"RGB", "L", "1", "CMYK", "YCbCr"})
_ALPHA = frozenset({"RGBA", "LA", "PA", "P", "RGBa", "La"})

# Largest pixel a supported file may hold: four channels of 16 bits; more bytes than that is not a picture.
BYTES_PER_PIXEL = 8

# What a file may hold besides its pixels: colour profiles, previews, notes.
BYTES_BESIDE = 16_000_000
# Passes over a progressive JPEG. Encoders make about ten; each takes as long as a picture of its own.
MOST_SCANS = 100

EMPTY = "empty file"
FOREIGN = "not a PNG, JPEG, TIFF or DICOM file"
LARGE = "more pixels than max_pixels"
FRAMES = "animated or several pages"
DAMAGED = "damaged or truncated"
DEPTH = "pixel type not supported"
HEAVY = "more bytes than its pixels need"
SCANS = "more passes than a JPEG needs"
SPECIAL = "not an ordinary file"
LOSSY = "a JPEG does not keep values"
NUMBERS = "its pixels are not one whole number each"
UNREADABLE = "cannot be read"


class BadImageError(Exception):
    """The file cannot be used; the message is one of this module's reasons."""


class Decoded(NamedTuple):
    """A picture (H, W, 3), the histogram (3, 256) of all its pixels, its format and size before resizing."""

    pixels: NDArray[np.uint8]
    histogram: NDArray[np.int64]
    format: str
    width: int
    height: int


def read_picture(path: Path, *, max_pixels: int) -> bytes:
    """Return the bytes of a file, which is looked at first: no more are read than its kind and size allow.

    Raises:
        BadImageError: with one of this module's reasons.
    """
    from confrere.data import dicom

    try:
        with intake.open_file(path) as file:
            total, head = os.fstat(file.fileno()).st_size, file.read(132)
            file.seek(0)
            pixels = dicom.announced(file) if dicom.is_dicom(head) else _pixels(_sniff(head)[1], file)
            if pixels > max_pixels:
                raise BadImageError(LARGE)
            if total > most_bytes(pixels):
                raise BadImageError(HEAVY)
            file.seek(0)
            return file.read()
    except OSError as error:
        raise BadImageError(refusal(error)) from error


def most_bytes(pixels: int) -> int:
    """Return how large a file of so many pixels may be."""
    return pixels * BYTES_PER_PIXEL + BYTES_BESIDE


def refusal(error: OSError) -> str:
    """Return the reason why a file could not be read."""
    return SPECIAL if error.errno == errno.EINVAL else UNREADABLE


def _pixels(plugin: type[ImageFile], file: BinaryIO) -> int:
    """Return the number of pixels that a header announces."""
    try:
        image = plugin(file)
        return image.width * image.height
    except Exception as error:  # as in decode
        raise BadImageError(DAMAGED) from error


def decode(data: bytes, size: tuple[int, int], *, max_pixels: int) -> Decoded:
    """Decode a whole file and resize it so that it covers ``size`` = (height, width), cut at the centre.

    Raises:
        BadImageError: with one of this module's reasons.
    """
    from confrere.data import dicom

    if dicom.is_dicom(data):
        return dicom.decode_dicom(data, size, max_pixels=max_pixels)
    name, plugin = _sniff(data)
    if name == "JPEG" and data.count(b"\xff\xda") > MOST_SCANS:
        raise BadImageError(SCANS)
    try:
        with plugin(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise BadImageError(LARGE)
            if getattr(image, "is_animated", False):
                raise BadImageError(FRAMES)
            image.load()
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
            fitted = ImageOps.fit(rgb, (size[1], size[0]), method=Image.Resampling.BICUBIC)
            return Decoded(
                pixels=np.asarray(fitted, dtype=np.uint8),
                histogram=np.array(rgb.histogram(), dtype=np.int64).reshape(3, 256),
                format=name,
                width=upright.width,
                height=upright.height,
            )
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types; each becomes a reported bad file
        raise BadImageError(DAMAGED) from error


def values(data: bytes) -> NDArray[np.integer[Any]]:
    """Return the pixels (H, W) of a picture whose values are meant as numbers: PNG or TIFF, one channel, upright.

    Raises:
        BadImageError: with one of this module's reasons.
    """
    name, plugin = _sniff(data)
    if name == "JPEG":
        raise BadImageError(LOSSY)
    try:
        with plugin(io.BytesIO(data)) as image:
            if getattr(image, "is_animated", False):
                raise BadImageError(FRAMES)
            image.load()
            found = np.asarray(ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except Exception as error:  # as in decode
        raise BadImageError(DAMAGED) from error
    found = found.astype(np.uint8) * 255 if found.dtype == bool else found
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
        raise BadImageError(NUMBERS)
    return found


def _sniff(data: bytes) -> tuple[str, type[ImageFile]]:
    if not data:
        raise BadImageError(EMPTY)
    for magic, name, plugin in _FORMATS:
        if data.startswith(magic):
            return name, plugin
    raise BadImageError(FOREIGN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in _ALPHA or (image.mode in {"L", "RGB"} and "transparency" in image.info):
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, (0, 0, 0, 255)), colour).convert("RGB")
    if image.mode in _DIRECT:
        return image.convert("RGB")
    raise BadImageError(DEPTH)

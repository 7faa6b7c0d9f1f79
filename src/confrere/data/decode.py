"""One file's bytes to one RGB picture, by fixed rules, or the reason why not.

Rules: the format is what the first bytes say (PNG, JPEG, TIFF); the size is read from the header before any
pixel; EXIF rotation is applied; 16-bit grey keeps its full range, 0..65535 to 0..255; alpha is laid over
black; palettes, grey, CMYK and YCbCr become RGB; colour profiles are ignored; several frames are refused.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

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

EMPTY = "empty file"
FOREIGN = "not a PNG, JPEG or TIFF file"
LARGE = "more pixels than max_pixels"
FRAMES = "animated or several pages"
DAMAGED = "damaged or truncated"
DEPTH = "pixel type not supported"


class BadImageError(Exception):
    """The file cannot be used; the message is one of this module's reasons."""


class Decoded(NamedTuple):
    """A picture (H, W, 3), the histogram (3, 256) of all its pixels, its format and size before resizing."""

    pixels: NDArray[np.uint8]
    histogram: NDArray[np.int64]
    format: str
    width: int
    height: int


def decode(data: bytes, size: tuple[int, int], *, max_pixels: int) -> Decoded:
    """Decode a whole file and resize it so that it covers ``size`` = (height, width), cut at the centre.

    Raises:
        BadImageError: with one of this module's reasons.
    """
    name, plugin = _sniff(data)
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

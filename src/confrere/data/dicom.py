"""One DICOM file's bytes to one RGB picture, by fixed rules, or the reason why not; needs the extra ``dicom``.

Rules, in this order: the header is checked (:mod:`confrere.data.dicom_checks`); grey values go through the modality LUT
or rescale, then the first VOI LUT, else the first window, else from their least to their greatest value to 0..255;
MONOCHROME1 is inverted; padding is black; YBR, palettes and colours of up to 16 bits become 8-bit RGB; pixels that are
not square are enlarged to square ones. Overlays, colour profiles and presentation LUTs are ignored.
Whatever reads raises MissingExtraError when pydicom is not installed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from confrere.data import dicom_checks as checks
from confrere.data.decode import BYTES_BESIDE, DAMAGED, HEAVY, LARGE, BadImageError, Decoded
from confrere.errors import MissingExtraError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

TABLE = "DICOM rescale, window or lookup table not valid"
SPACING = "DICOM pixel spacing not valid"

# What a data sheet counts; the phrases follow "n DICOM files".
BURNED_IN = "may show text within the picture"
NOT_CLEARED = "are not marked as de-identified"
NAMED = "hold a patient's name, number or birth date"
PROGRAM = "begin like a program"

_LUTS = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence")
_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")
_WINDOW = ("WindowCenter", "WindowWidth", "VOILUTFunction")
_PALETTE = [f"{c}PaletteColorLookupTable{part}" for c in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")]
# The first that is given says how high and how wide a pixel is.
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
_LOOK = (*checks.FORMAT, *_LUTS, *_PADDING, *_WINDOW, *_PALETTE, *_SPACINGS)
_IDENTITY = ("PatientName", "PatientID", "PatientBirthDate")
_MARKS = ("BurnedInAnnotation", "Modality", "PatientIdentityRemoved")
_WRITING = (b"US", b"IVUS", b"XA", b"RF", b"ES", b"GM", b"XC", b"OP", b"OT", b"SC")  # their machines write into it

_lock, _quiet, _readers = threading.Lock(), ExitStack(), 0


def is_dicom(head: bytes) -> bool:
    """Return whether the first 132 bytes are those of a DICOM file: any preamble, then ``DICM``."""
    return head[128:132] == b"DICM"


def announced(file: BinaryIO) -> int:
    """Return the number of pixels that a file's header announces; at most ``BYTES_BESIDE`` bytes are read.

    Raises BadImageError: not an image of one frame, or its header is damaged or longer than that.
    """
    with _reading():
        header = checks.read_header(file.read(BYTES_BESIDE), checks.FORMAT)
        if not header.tag and file.read(1):
            raise BadImageError(HEAVY)
        return checks.check_kind(header)


def decode_dicom(data: bytes, size: tuple[int, int], *, max_pixels: int) -> Decoded:
    """Decode a whole file and resize it so that it covers ``size`` = (height, width), cut at the centre.

    ``width`` and ``height`` of the result are the columns and rows of the file, ``format`` is ``"DICOM"``.

    Raises:
        BadImageError: with a reason of this module, of ``dicom_checks`` or of ``decode``.
    """
    with _reading():
        header = checks.read_header(data, _LOOK)
        if checks.check_kind(header) > max_pixels:
            raise BadImageError(LARGE)
        image = Image.fromarray(_pixels(header, data))
        square = _square(image, header.tags, max_pixels).convert("RGB")
        fitted = ImageOps.fit(square, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    return Decoded(
        pixels=np.asarray(fitted, dtype=np.uint8),
        histogram=np.array(square.histogram(), dtype=np.int64).reshape(3, 256),
        format="DICOM",
        width=image.width,
        height=image.height,
    )


def notes(data: bytes) -> tuple[str, ...]:
    """Return what a data sheet should count of a file: some of this module's phrases, never a value."""
    with _reading():
        header = checks.read_header(data, ("SOPClassUID", *_MARKS, *_IDENTITY))
        burned, modality, cleared = (_raw(header.tags, name).upper() for name in _MARKS)
        named = any(_raw(header.tags, name) for name in _IDENTITY)
    writes = modality in _WRITING or header.kind in checks.CAPTURES
    found = {
        BURNED_IN: burned == b"YES" or (burned != b"NO" and writes),
        NOT_CLEARED: cleared != b"YES",
        NAMED: named,
        PROGRAM: data.startswith((b"MZ", b"\x7fELF", b"#!")),
    }
    return tuple(note for note, holds in found.items() if holds)


def note_warnings(site: str, counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each phrase of :func:`notes`, with the number of a site's files it holds for."""
    return [f"{site}: {count} DICOM files {note}." for note, count in sorted(counts.items())]


def patient_key(data: bytes, salt: bytes) -> str | None:
    """Return what stands for a file's patient: HMAC-SHA256 of issuer and patient number, None when there is no number.

    Args:
        data: the file, or its first ``BYTES_BESIDE`` bytes.
        salt: 16 random bytes or more, which are drawn anew in every process and stored nowhere. The key then says no
            more than which files of one process are of one patient.

    Raises:
        BadImageError: the header cannot be read.
        ValueError: the salt is shorter: numbers of patients can be guessed one after another.
    """
    if len(salt) < 16:
        raise ValueError("the salt must have at least 16 bytes")
    with _reading():
        tags = checks.read_header(data, ("PatientID", "IssuerOfPatientID")).tags
        issuer, number = _raw(tags, "IssuerOfPatientID"), _raw(tags, "PatientID")
    return hmac.new(salt, issuer + b"\0" + number, hashlib.sha256).hexdigest() if number else None


def _raw(tags: Dataset, keyword: str) -> bytes:
    """Return a tag's bytes as they stand in the file, without what fills them up."""
    value = getattr(tags.get_item(keyword) if keyword in tags else None, "value", None)
    return bytes(value).strip(b" \0^=") if value else b""


@contextmanager
def _reading() -> Iterator[None]:
    """Let pydicom neither warn nor log, and turn what it raises into a reason: all three quote tags.

    Filters and levels belong to the process. They are set when the first thread comes in and put back when the last
    one leaves, so that of threads that overlap none puts back what another had set; other packages' warnings pass.
    """
    global _readers
    try:
        import pydicom.pixels  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pydicom", "dicom", needed_for="reading DICOM images") from error
    with _lock:
        if not _readers:
            _quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"pydicom|pylibjpeg|openjpeg|PIL|confrere\.data\.dicom")
            for logger in map(logging.getLogger, ("pydicom", "pylibjpeg", "openjpeg")):
                _quiet.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.CRITICAL + 1)
        _readers += 1
    try:
        yield
    except BadImageError:
        raise
    except Exception:  # pydicom and its decoders raise a dozen types
        raise BadImageError(DAMAGED) from None
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                _quiet.close()


def _pixels(header: checks.Header, data: bytes) -> NDArray[np.uint8]:
    """Return (H, W) grey or (H, W, 3) RGB."""
    from pydicom.pixels.decoders.base import get_decoder

    options, decoder = checks.pixel_options(header), get_decoder(header.syntax)
    name, value = checks.plugin(header, decoder.available_plugins), checks.pixel_value(header, data, options)
    # With Adobe's marker Pillow makes RGB at once, which pydicom would take for YBR still.
    raw = name == "pillow" and re.search(rb"\xff\xee..Adobe", value, re.DOTALL) is not None
    stored: NDArray[Any] = decoder.as_array(value, index=0, raw=raw, decoding_plugin=name, **options)[0]
    stored = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("="))
    if stored.shape[:2] != (options["rows"], options["columns"]):
        raise BadImageError(DAMAGED)
    # Every value that the type can hold, in the order of the bit patterns: each rule is computed once a value.
    levels = np.arange(2 ** (8 * stored.itemsize), dtype=f"u{stored.itemsize}").view(stored.dtype).astype(np.int32)
    try:
        if stored.ndim == 3:
            return _mapped(stored, np.minimum(levels / (2.0 ** options["bits_stored"] - 1), 1) * 255)
        if options["photometric_interpretation"] == "PALETTE COLOR":
            return _mapped(stored, _palette(levels, header))
        return _mapped(stored, _grey(levels, stored, header.tags))
    except BadImageError:
        raise
    except Exception:  # as in _reading
        raise BadImageError(TABLE) from None


def _mapped(pixels: NDArray[Any], table: NDArray[Any]) -> NDArray[np.uint8]:
    """Look every pixel up in a table (V, ...) of values 0..255, one row for each bit pattern."""
    table, patterns = np.rint(table).astype(np.uint8), pixels.view(f"u{pixels.itemsize}")
    out = np.empty((*pixels.shape, *table.shape[1:]), dtype=np.uint8)
    rows = max(1, 2**20 // pixels.shape[1])  # at a time: NumPy makes eight bytes of every index
    for row in range(0, len(pixels), rows):
        out[row : row + rows] = table[patterns[row : row + rows]]
    return out


def _grey(levels: NDArray[np.int32], stored: NDArray[Any], tags: Dataset) -> NDArray[np.float64]:
    """Return what each value becomes, 0..255 (PS3.3 C.11.1, C.11.2.1, C.7.5.1.1.2)."""
    from pydicom.pixels.processing import apply_modality_lut

    given = [tags[name].value for name in _PADDING if tags.get(name) is not None]
    # By bit pattern: some machines write the padding of signed pixels as an unsigned number.
    ends = [int(levels[int(end) % len(levels)]) for end in given if tags.get(_PADDING[0]) is not None]
    padding = (levels >= min(ends, default=1)) & (levels <= max(ends, default=0))
    values: NDArray[np.float64] = apply_modality_lut(levels, tags).astype(np.float64)
    if not np.isfinite(values).all() or ("RescaleSlope" in tags) != ("RescaleIntercept" in tags):
        raise BadImageError(TABLE)
    if tags.get("VOILUTSequence"):
        shown = _voi(values, tags)
    elif any(tags.get(name) is not None for name in _WINDOW[:2]):
        shown = _windowed(values, tags)
    else:
        used = values[np.isin(levels, np.unique(stored)) & ~padding]
        least, most = (used.min(), used.max()) if used.size else (0.0, 0.0)
        shown = np.clip((values - least) / ((most - least) or 1.0), 0, 1) * 255
    shown = 255 - shown if tags.PhotometricInterpretation == "MONOCHROME1" else shown
    return np.where(padding, 0, shown)


def _windowed(values: NDArray[np.float64], tags: Dataset) -> NDArray[np.float64]:
    """Apply the first window to 0..255: a data set of 8 unsigned bits without rescale makes pydicom do just that."""
    from pydicom.dataset import Dataset
    from pydicom.pixels.processing import apply_windowing

    view = Dataset()
    for element in (tags[name] for name in _WINDOW if tags.get(name) is not None):
        view.add(element)
        if element.keyword in _WINDOW[:2] and not isfinite(element.value[0] if element.VM > 1 else element.value):
            raise BadImageError(TABLE)
    view.PhotometricInterpretation, view.BitsStored, view.PixelRepresentation = "MONOCHROME2", 8, 0
    shown: NDArray[np.float64] = apply_windowing(values, view)
    return shown


def _voi(values: NDArray[np.float64], tags: Dataset) -> NDArray[np.float64]:
    """Apply the first VOI LUT to 0..255.

    pydicom's index has the type of the entries: it gets no value beyond them, and no entries of 8 bits.
    """
    from pydicom.dataset import Dataset
    from pydicom.pixels.processing import apply_voi

    view, wide, item = Dataset(), Dataset(), tags.VOILUTSequence[0]
    entries, first, depth = item.LUTDescriptor
    wide.add(item["LUTData"])
    wide.add_new("LUTDescriptor", "SS" if first < 0 else "US", [entries, first, max(depth, 10)])
    view.VOILUTSequence = [wide]
    view.set_original_encoding(*tags.original_encoding)
    index = np.clip(np.rint(values), first, first + (entries or 2**16) - 1).astype(np.int32)
    shown: NDArray[np.float64] = np.minimum(apply_voi(index, view) / (2.0**depth - 1), 1) * 255
    return shown


def _palette(levels: NDArray[np.int32], header: checks.Header) -> NDArray[np.float64]:
    """Return the colour (V, 3) of each value, 0..255."""
    from pydicom.pixels.processing import apply_color_lut

    entries, _, depth = header.tags.RedPaletteColorLookupTableDescriptor
    entries, little = entries or 2**16, checks.NATIVE.get(header.syntax, (False, True))[1]
    wide = len(header.tags.RedPaletteColorLookupTableData) == 2 * entries
    # pydicom's index has the type of the entries, and these have the byte order of this machine.
    if depth not in (8, 16) or (wide and not little) or (not wide and entries > 256):
        raise BadImageError(checks.COLOUR)
    colours: NDArray[np.float64] = apply_color_lut(levels, header.tags) / (257.0 if depth == 16 else 1.0)
    return colours


def _square(image: Image.Image, tags: Dataset, max_pixels: int) -> Image.Image:
    """Return a picture whose pixels are square, to one per cent; the coarser direction is enlarged."""
    try:
        vertical, horizontal = map(float, next((tags[name].value for name in _SPACINGS if tags.get(name)), (1, 1)))
    except (TypeError, ValueError):
        raise BadImageError(SPACING) from None
    if not (0 < vertical < inf and 0 < horizontal < inf):
        raise BadImageError(SPACING)
    ratio = vertical / horizontal
    if 0.99 <= ratio <= 1.01:
        return image
    width, height = image.width * max(1.0, 1 / ratio), image.height * max(1.0, ratio)
    if width * height > max_pixels:
        raise BadImageError(LARGE)
    return image.resize((round(width), round(height)), Image.Resampling.BICUBIC)

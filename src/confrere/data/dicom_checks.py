"""What must hold of a DICOM file before its pixels are decoded: one whole frame, of a kind that is a 2-D image.

The header is read once and no further than the pixels; only the tags asked for are loaded. What stands in brackets
in a reason is for the local user: a data sheet counts by the words before them (see :func:`in_short`).
"""

from __future__ import annotations

import io
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from confrere.data.decode import DAMAGED, DEPTH, HEAVY, MOST_SCANS, SCANS, BadImageError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

INDEX = "DICOMDIR, an index of other files"
KIND = "DICOM of a kind that is no 2-D image"
NO_PIXELS = "DICOM without pixels"
FRAMES = "DICOM of several frames"
SYNTAX = "DICOM transfer syntax not supported"
CODEC = "DICOM decoder missing"
LENGTH = "DICOM pixels cut short, or of another size than the header says"
COLOUR = "DICOM colours not supported"

MOST_ITEMS = 10_000  # of sequences: pydicom makes an object of each
_PIXELS, _FLOATS = 0x7FE00010, (0x7FE00008, 0x7FE00009)
_ITEM, _END, _UNDEFINED = 0xE000FFFE, 0xE0DDFFFE, 0xFFFFFFFF  # as little-endian numbers
_SIZES = {bytes([code]) for code in (*range(0xC0, 0xD0), 0xF7)} - {b"\xc4", b"\xc8", b"\xcc"}  # SOFn of JPEG

_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_COUNTS = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation")
_OPTIONAL = ("SOPClassUID", "NumberOfFrames", "PhotometricInterpretation", "PlanarConfiguration", "HighBit")
FORMAT = (*_COUNTS, *_OPTIONAL, *_GROUPS)
"""Tags that :func:`check_kind` and :func:`pixel_options` look at."""

_DICOMDIR, _STORAGE = "1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1."
# SOP classes whose layout and, if grey, whose rescale and window stand at the top of the data set.
CAPTURES = frozenset(f"{_STORAGE}{number}" for number in ("7", "7.2", "7.3", "7.4"))  # grey of 8 or 16 bits, colour
_RADIOGRAPHS = ("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1", "12.1", "12.2")  # CR, DX, MG, IO; XA, XRF
_SCANS = ("2", "4", "20", "128", "3", "3.1", "6", "6.1")  # CT, MR, NM, PET; ultrasound, retired and not
_VISIBLE = ("1", "2", "3", "4", "5.1", "5.2", "7")  # endoscopes, microscopes, cameras, eyes, dermoscopes
KINDS = CAPTURES.union(
    (f"{_STORAGE}{number}" for number in (*_RADIOGRAPHS, *_SCANS)), (f"{_STORAGE}77.1.{number}" for number in _VISIBLE)
)


class Codec(NamedTuple):
    """A compression, the one decoder that is used for it (so that all sites get the same pixels) and its package."""

    name: str
    plugin: str
    package: str
    colours: tuple[str, ...]


# Transfer syntax: (implicit VR, little endian) where pixels are not compressed; those that are follow the second.
_U = "1.2.840.10008.1.2"
NATIVE = {_U: (True, True), f"{_U}.1": (False, True), f"{_U}.2": (False, False)}
_ALL, _PLAIN, _WAVELET = ("RGB", "YBR_FULL", "YBR_FULL_422"), ("RGB", "YBR_FULL"), ("RGB", "YBR_ICT", "YBR_RCT")
_LOSSLESS, _LS = (
    Codec("JPEG Lossless", "gdcm", "python-gdcm", _PLAIN),
    Codec("JPEG-LS", "pyjpegls", "pyjpegls", _PLAIN),
)
_J2K = Codec("JPEG 2000", "pylibjpeg", "pylibjpeg-openjpeg", _WAVELET)
CODECS = {
    f"{_U}.4.50": Codec("JPEG Baseline", "pillow", "pillow", _ALL),
    f"{_U}.4.51": Codec("JPEG Extended", "pillow", "pillow", _ALL),
    **dict.fromkeys((f"{_U}.4.57", f"{_U}.4.70"), _LOSSLESS),
    **dict.fromkeys((f"{_U}.4.80", f"{_U}.4.81"), _LS),
    **dict.fromkeys((f"{_U}.4.{number}" for number in (90, 91, 201, 202, 203)), _J2K),
    f"{_U}.5": Codec("RLE", "pydicom", "pydicom", _PLAIN),
}
_TWELVE = "JPEG Extended of 12 bits: convert the file, for example with dcmdjpeg"  # the only decoder here is GPL


class Header(NamedTuple):
    """What comes before the pixels.

    Attributes:
        tags: the tags that were asked for.
        syntax: UID of the transfer syntax; ``kind``: of the SOP class.
        tag: of the pixel data, 0 when there are none; ``vr``: theirs, or "".
        start: offset of their value in the file; ``length``: in bytes, as announced.
    """

    tags: Dataset
    syntax: str
    kind: str
    tag: int
    vr: str
    start: int
    length: int


def in_short(reason: str) -> str:
    """Return a reason without what stands in brackets: what a data sheet may count by."""
    return reason.partition(" (")[0]


def decoders() -> str:
    """Return the packages that decide the pixels of a DICOM file, with versions; "" when none is installed."""
    names = sorted({"pydicom", *(codec.package for codec in CODECS.values())} - {"pillow"})
    return ", ".join(f"{name} {found.version}" for name in names for found in metadata.distributions(name=name))


def read_header(data: bytes, keywords: tuple[str, ...]) -> Header:
    """Return the tags called ``keywords`` of a file's bytes, of which the end may be missing.

    Raises:
        BadImageError: the transfer syntax is unknown, or there are more items than in any honest header.
    """
    from pydicom.filereader import read_dataset
    from pydicom.tag import Tag
    from pydicom.uid import UID

    if data.count(b"\xfe\xff\x00\xe0") + data.count(b"\xff\xfe\xe0\x00") > MOST_ITEMS:
        raise BadImageError(HEAVY)
    file = io.BytesIO(data)
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID", ""))
    if syntax not in NATIVE and syntax not in CODECS:
        name = UID(syntax).name  # the UID itself when it is not registered
        raise BadImageError(f"{SYNTAX} ({'none that is registered' if name == syntax else name})")
    found: list[tuple[int, str, int]] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        number = int(tag)  # pydicom's own comparison takes a third of all the time
        if number in (_PIXELS, *_FLOATS):
            found.append((number, vr or "", length))
        return number in (_PIXELS, *_FLOATS)

    implicit, little = NATIVE.get(syntax, (False, True))
    wanted: list[Any] = [Tag(keyword) for keyword in keywords]
    tags = read_dataset(file, implicit, little, stop_when=at_pixels, specific_tags=wanted)
    kind = str(tags.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    tag, vr, length = found[-1] if found else (0, "", 0)
    return Header(tags, syntax, kind, tag, vr, file.tell() + (12 if vr else 8), length)


def check_kind(header: Header) -> int:
    """Return the number of pixels that a header announces.

    Raises:
        BadImageError: another kind of object, no pixels, floating point, several frames or no size.
    """
    tags = header.tags
    if header.kind == _DICOMDIR:
        raise BadImageError(INDEX)
    if not header.tag:
        raise BadImageError(NO_PIXELS if header.kind in KINDS else KIND)
    if header.tag in _FLOATS:
        raise BadImageError(DEPTH)
    frames = 1 if tags.get("NumberOfFrames") is None else _whole(tags, "NumberOfFrames")
    if frames > 1:
        raise BadImageError(f"{FRAMES} ({frames:,}: save those you want as files of one frame)")
    if header.kind not in KINDS or any(name in tags for name in _GROUPS):
        raise BadImageError(KIND)
    pixels = _whole(tags, "Rows") * _whole(tags, "Columns")
    if not pixels or not frames:
        raise BadImageError(DAMAGED)
    return pixels


def _whole(tags: Dataset, keyword: str) -> int:
    """Return a tag's number; DAMAGED when it is missing, several or negative."""
    value = tags.get(keyword)
    if not isinstance(value, int) or value < 0:
        raise BadImageError(DAMAGED)
    return int(value)


def pixel_options(header: Header) -> dict[str, Any]:
    """Return the layout of the pixels, as pydicom's decoders want it.

    Raises:
        BadImageError: a layout, or colours in this compression, that could only be guessed at.
    """
    rows, columns, samples, allocated, stored, signed = (_whole(header.tags, keyword) for keyword in _COUNTS)
    photometric = str(header.tags.get("PhotometricInterpretation", ""))
    found: dict[str, Any] = {"pixel_keyword": "PixelData", "pixel_vr": header.vr or "OW", "number_of_frames": 1}
    found |= {"rows": rows, "columns": columns, "samples_per_pixel": samples, "bits_allocated": allocated}
    found |= {"bits_stored": stored, "pixel_representation": signed, "photometric_interpretation": photometric}
    high = header.tags.get("HighBit")
    if allocated not in (1, 8, 16) or not 1 <= stored <= allocated or high not in (None, stored - 1) or signed > 1:
        raise BadImageError(DEPTH)
    if photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"):
        if samples != 1 or (allocated == 1 and header.syntax not in NATIVE):
            raise BadImageError(DEPTH)
        return found
    colours = _ALL if header.syntax in NATIVE else CODECS[header.syntax].colours
    narrow = allocated == 1 or (photometric.startswith("YBR_FULL") and stored != 8)
    halved = photometric == "YBR_FULL_422" and header.syntax in NATIVE and columns % 2
    if photometric not in colours or samples != 3 or signed or narrow or halved:
        raise BadImageError(COLOUR)
    return found | {"planar_configuration": _whole(header.tags, "PlanarConfiguration")}


def plugin(header: Header, available: tuple[str, ...]) -> str:
    """Return the name of the decoder to use out of pydicom's ``available`` ones, "" for pixels not compressed.

    Raises:
        BadImageError: it is not installed; the reason names the compression and the package.
    """
    if header.syntax in NATIVE:
        return ""
    codec = CODECS[header.syntax]
    if codec.name == "JPEG Extended" and _whole(header.tags, "BitsStored") != 8:
        raise BadImageError(f"{CODEC} ({_TWELVE})")
    if codec.plugin not in available:
        raise BadImageError(f"{CODEC} ({codec.name}: pip install {codec.package})")
    return codec.plugin


def pixel_value(header: Header, data: bytes, options: dict[str, Any]) -> bytes:
    """Return the value of the pixel data, checked to hold one whole frame of the size that the header says.

    Raises:
        BadImageError: cut short, continued, several frames, or a frame of another size.
    """
    bits = options["rows"] * options["columns"] * options["samples_per_pixel"] * options["bits_allocated"]
    expected = (bits + 7) // 8
    if header.syntax in NATIVE:
        if options["photometric_interpretation"] == "YBR_FULL_422":
            expected = expected // 3 * 2
        value = data[header.start : header.start + header.length]
        if header.length not in (expected, expected + expected % 2) or len(value) != header.length:
            raise BadImageError(LENGTH)
        return value
    value, fragments = _fragments(header, data)
    frame = b"".join(fragments)
    if CODECS[header.syntax].name == "RLE":
        _check_runs(frame, options["rows"] * options["columns"])
        return value
    size, samples = _stream_size(frame)
    starts = sum(part.startswith((b"\xff\xd8\xff", b"\xff\x4f\xff\x51")) for part in fragments)
    whole = starts == 1 and frame.rstrip(b"\0\xff").endswith(b"\xff\xd9")
    if not whole or size != (options["rows"], options["columns"]) or samples != options["samples_per_pixel"]:
        raise BadImageError(LENGTH)
    mixed = frame[frame.find(b"\xff\x52") + 8 :][:1] == b"\1"  # JPEG 2000: its decoder makes RGB of these
    if options["photometric_interpretation"] in ("YBR_ICT", "YBR_RCT") and not mixed:
        raise BadImageError(COLOUR)
    return value


def _fragments(header: Header, data: bytes) -> tuple[bytes, list[bytes]]:
    """Return the encapsulated value without its end, which must be there, and the fragments of its only frame."""
    at, parts = header.start, []
    while (tag := int.from_bytes(data[at : at + 4], "little")) == _ITEM:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        parts.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    whole = header.length == _UNDEFINED and tag == _END and data[at + 4 : at + 8] == bytes(4)
    if not whole or len(parts) < 2 or len(parts[0]) not in (0, 4):  # the first: an offset for each frame, or none
        raise BadImageError(LENGTH)
    return data[header.start : at], parts[1:]


def _stream_size(frame: bytes) -> tuple[tuple[int, int], int]:
    """Return (height, width) and samples that a JPEG, JPEG-LS or JPEG 2000 stream announces; decoders believe it."""
    if frame.count(b"\xff\xda") > MOST_SCANS:
        raise BadImageError(SCANS)
    if frame.startswith(b"\xff\x4f\xff\x51"):
        right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in range(8, 24, 4))
        return (bottom - top, right - left), int.from_bytes(frame[40:42], "big")
    at = 2
    while frame[at : at + 1] == b"\xff" and frame[at + 1 : at + 2] not in _SIZES:
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    size = int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
    return size, sum(frame[at + 9 : at + 10])


def _check_runs(frame: bytes, pixels: int) -> None:
    """Follow the runs of every RLE segment without unfolding them: two bytes can stand for 128."""
    count = int.from_bytes(frame[:4], "little")
    starts = [int.from_bytes(frame[at : at + 4], "little") for at in range(4, 4 + 4 * min(count, 15), 4)]
    for at, end in zip(starts, [*starts[1:], len(frame)], strict=True):
        made = 0
        while at < end and made < pixels:
            head = frame[at]
            at += head + 2 if head < 128 else 2 if head > 128 else 1
            made += head + 1 if head < 128 else 257 - head if head > 128 else 0
        if made != pixels or at > end or end - at > 2:
            raise BadImageError(LENGTH)

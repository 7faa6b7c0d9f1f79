from __future__ import annotations

import io
import logging
import math
import struct
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pydicom = pytest.importorskip("pydicom")
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.datadict import dictionary_VR, tag_for_keyword  # noqa: E402

from confrere.data import decode as pictures  # noqa: E402
from confrere.data import dicom, dicom_checks  # noqa: E402
from confrere.data.decode import BadImageError, Decoded  # noqa: E402
from confrere.data.federation import load_federation  # noqa: E402
from confrere.data.options import DataOptions  # noqa: E402
from confrere.errors import MissingExtraError  # noqa: E402

EXPLICIT, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
JPEG, RLE, DEFLATED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99"
CAPTURE, CT, US = (f"1.2.840.10008.5.1.4.1.1.{kind}" for kind in ("7", "2", "6.1"))
LIMIT = 1_000_000
LONG = {"OB", "OW", "SQ", "UN", "UT"}


def bundled(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not in this wheel of pydicom")
    return Path(path).read_bytes()


# A writer of our own: pydicom's would mend, or warn of, what these tests want wrong.
def element(keyword: str, value: object, syntax: str = EXPLICIT, signed: bool = False) -> bytes:
    order = ">" if syntax == BIG else "<"
    vr = dictionary_VR(keyword)
    vr = "OW" if vr in ("OB or OW", "US or OW") else ("SS" if signed else "US") if vr.startswith("US or SS") else vr
    if vr == "SQ":
        items = [b"".join(element(k, v, syntax, signed) for k, v in item.items()) for item in value]  # type: ignore[attr-defined]
        body = b"".join(struct.pack(order + "HHL", 0xFFFE, 0xE000, len(item)) + item for item in items)
    elif isinstance(value, bytes):
        body = value
    elif vr in ("US", "SS", "FL"):
        many = value if isinstance(value, tuple) else (value,)
        body = b"".join(struct.pack(order + {"US": "H", "SS": "h", "FL": "f"}[vr], one) for one in many)
    else:
        body = ("\\".join(map(str, value)) if isinstance(value, tuple) else str(value)).encode()
    body += (b"\0" if vr == "UI" else b" ") * (len(body) % 2)
    tag = tag_for_keyword(keyword)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if syntax == IMPLICIT:
        return head + struct.pack("<L", len(body)) + body
    if vr in LONG:
        return head + vr.encode() + b"\0\0" + struct.pack(order + "L", len(body)) + body
    return head + vr.encode() + struct.pack(order + "H", len(body)) + body


def written(pixels: np.ndarray | bytes | list[bytes], syntax: str = EXPLICIT, **tags: object) -> bytes:
    """Return a file; ``pixels`` is an array, the bytes of uncompressed ones, or the fragments of a compressed frame."""
    base: dict[str, object] = {"SOPClassUID": CAPTURE, "PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1}
    if isinstance(pixels, np.ndarray):
        base |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1]}
        base |= {"BitsAllocated": 8 * pixels.itemsize, "PixelRepresentation": int(pixels.dtype.kind == "i")}
        if pixels.ndim == 3:
            base |= {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
        pixels = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
    base |= tags
    base.setdefault("BitsStored", base["BitsAllocated"])
    base.setdefault("HighBit", max(0, int(base["BitsStored"]) - 1))  # type: ignore[call-overload]
    signed = base["PixelRepresentation"] == 1
    elements = {tag_for_keyword(k): element(k, v, syntax, signed) for k, v in base.items() if v is not None}
    if isinstance(pixels, bytes):
        pixels += b"\0" * (len(pixels) % 2)
        if syntax == BIG and base["BitsAllocated"] == 8:  # words of two pixels
            pixels = np.frombuffer(pixels, "u2").byteswap().tobytes()
        last = element("PixelData", pixels, syntax)
    else:
        items = b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(part)) + part for part in [b"", *pixels])
        last = b"\xe0\x7f\x10\x00OB\0\0" + b"\xff" * 4 + items + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    meta = element("MediaStorageSOPClassUID", base["SOPClassUID"] or CAPTURE) + element("TransferSyntaxUID", syntax)
    group = element("FileMetaInformationGroupLength", struct.pack("<L", len(meta)))
    return bytes(128) + b"DICM" + group + meta + b"".join(elements[tag] for tag in sorted(elements)) + last


def run(data: bytes, limit: int = LIMIT) -> Decoded:
    """Decode without resizing, where pixels are square."""
    header = dicom_checks.read_header(data, ("Rows", "Columns"))
    return dicom.decode_dicom(data, (header.tags.Rows, header.tags.Columns), max_pixels=limit)


def grey(data: bytes) -> np.ndarray:
    pixels = run(data).pixels
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def fails(data: bytes, reason: str, limit: int = LIMIT) -> None:
    with pytest.raises(BadImageError) as caught:
        dicom.decode_dicom(data, (8, 8), max_pixels=limit)
    assert dicom_checks.in_short(str(caught.value)) == reason
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def ramp(least: int, most: int, kind: str = "i2") -> np.ndarray:
    return np.linspace(least, most, 12).round().astype(kind).reshape(3, 4)


def spread(values: np.ndarray) -> np.ndarray:
    return np.rint((values - values.min()) / (values.max() - values.min()) * 255)


# --- what pydicom bundles


def test_the_magic_bytes_stand_behind_the_preamble():
    assert dicom.is_dicom(bundled("CT_small.dcm")[:132])
    assert not dicom.is_dicom(bytes(128) + b"DICN")
    assert not dicom.is_dicom(b"DICM")


def test_without_a_window_the_least_and_greatest_value_but_padding_are_black_and_white():
    data = bundled("CT_small.dcm")
    stored = pydicom.dcmread(io.BytesIO(data)).pixel_array.astype(float)
    kept = stored != -2000
    expected = np.zeros(stored.shape)
    expected[kept] = np.rint((stored[kept] - stored[kept].min()) / (stored[kept].max() - stored[kept].min()) * 255)
    result = run(data)
    assert (result.format, result.width, result.height) == ("DICOM", 128, 128)
    assert np.array_equal(result.pixels[..., 1], expected)
    assert np.array_equal(result.histogram[0], np.bincount(result.pixels[..., 0].ravel(), minlength=256))


@pytest.mark.parametrize("variant", ["implicit", "bigendian", "expb", "RLE", "jp2klossless"])
def test_one_picture_in_every_lossless_syntax(variant):
    data = bundled("MR_small.dcm")
    stored = pydicom.dcmread(io.BytesIO(data)).pixel_array
    expected = [[round(standard(int(value), 600, 1600)) for value in row] for row in stored]
    assert np.array_equal(grey(data), expected)
    assert np.array_equal(grey(bundled(f"MR_small_{variant}.dcm")), expected)


@pytest.mark.parametrize(
    "name",
    ["SC_rgb_jpeg_dcmd", "SC_rgb_small_odd", "SC_rgb_small_odd_big_endian", "SC_rgb_rle", "examples_rgb_color"],
)
def test_colours_without_loss_are_unchanged(name):
    data = bundled(f"{name}.dcm")
    assert np.array_equal(run(data).pixels, pydicom.dcmread(io.BytesIO(data)).pixel_array)


@pytest.mark.parametrize(
    "name",
    [
        "dcmtk_+eb+cr",
        "dcmtk_+eb+cy+n1",
        "dcmtk_+eb+cy+np",
        "dcmtk_+eb+cy+s4",
        "jpeg_lossy_gdcm",
        "gdcm_KY",
        "rle_16bit",
    ],
)
def test_one_colour_picture_in_every_lossy_syntax(name):
    expected = run(bundled("SC_rgb_rle.dcm")).pixels.astype(int)
    errors = abs(run(bundled(f"SC_rgb_{name}.dcm")).pixels - expected)
    assert np.quantile(errors, 0.8) <= 2  # bars of colour: subsampling blurs their edges


def test_a_picture_of_ultrasound_as_wavelets_and_as_it_is():
    small = Image.fromarray(run(bundled("examples_jpeg2k.dcm")).pixels).resize((320, 240), Image.Resampling.BOX)
    assert abs(np.asarray(small).astype(int) - run(bundled("examples_rgb_color.dcm")).pixels).mean() < 5


REFUSED = {
    "rtdose": dicom_checks.FRAMES,
    "examples_ybr_color": dicom_checks.FRAMES,
    "rtdose_1frame": dicom_checks.KIND,
    "rtplan": dicom_checks.KIND,
    "test-SR": dicom_checks.KIND,
    "waveform_ecg": dicom_checks.KIND,
    "liver_1frame": dicom_checks.KIND,
    "reportsi": dicom_checks.KIND,
    "priv_SQ": dicom_checks.NO_PIXELS,
    "MR_truncated": dicom_checks.LENGTH,
    "MR_small_padded": dicom_checks.LENGTH,
    "JPEG2000-embedded-sequence-delimiter": dicom_checks.LENGTH,
    "SC_rgb_rle_32bit": pictures.DEPTH,
    "image_dfl": dicom_checks.SYNTAX,
    "meta_missing_tsyntax": dicom_checks.SYNTAX,
    "JPEG-lossy": dicom_checks.CODEC,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    fails(bundled(f"{name}.dcm"), REFUSED[name])


def test_an_index_of_files_is_refused_and_none_of_them_opened(monkeypatch):
    path = get_testdata_file("dicomdirtests/DICOMDIR", download=False)
    data, ordinary = Path(path).read_bytes(), bundled("CT_small.dcm")
    run(ordinary)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("os.open", refuse)
    monkeypatch.setattr("socket.socket", refuse)
    fails(data, dicom_checks.INDEX)
    run(ordinary)


def test_the_reason_says_how_many_frames_and_what_to_do():
    with pytest.raises(
        BadImageError, match=r"^DICOM of several frames \(30: save those you want as files of one frame"
    ):
        run(bundled("examples_ybr_color.dcm"))


@pytest.mark.parametrize("syntax", dicom_checks.CODECS)
def test_a_missing_decoder_is_named_with_its_package(syntax):
    header = dicom_checks.read_header(written([b""], syntax, BitsAllocated=8, PixelRepresentation=0), ("BitsStored",))
    codec = dicom_checks.CODECS[syntax]
    assert dicom_checks.plugin(header, (codec.plugin,)) == codec.plugin
    with pytest.raises(BadImageError) as caught:
        dicom_checks.plugin(header, ("pylibjpeg",) if codec.plugin != "pylibjpeg" else ())
    assert str(caught.value) == f"DICOM decoder missing ({codec.name}: pip install {codec.package})"


def test_without_pydicom_the_extra_is_named(monkeypatch):
    data = bundled("CT_small.dcm")
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    calls = [
        lambda: dicom.decode_dicom(data, (8, 8), max_pixels=LIMIT),
        lambda: dicom.announced(io.BytesIO(data)),
        lambda: dicom.notes(data),
        lambda: dicom.patient_key(data, bytes(16)),
    ]
    for call in calls:
        with pytest.raises(MissingExtraError, match=r"confrere\[dicom\]") as caught:
            call()
        assert caught.value.code == "missing-extra"


# --- grey values


def standard(value: float, centre: float, width: float, function: str = "LINEAR") -> float:
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2 for an output of 0 to 255, one value at a time."""
    if function == "SIGMOID":
        return 255 / (1 + math.exp(min(700, -4 * (value - centre) / width)))
    shift, less = (0.5, 1) if function == "LINEAR" else (0, 0)
    if value <= centre - shift - (width - less) / 2:
        return 0
    if value > centre - shift + (width - less) / 2:
        return 255
    return ((value - (centre - shift)) / (width - less) + 0.5) * 255


@given(
    stored=st.lists(st.integers(-2048, 2047), min_size=12, max_size=12),
    centre=st.integers(-20_000, 20_000),
    width=st.integers(10, 40_000),
    slope=st.sampled_from(["1", "-1", "0.5", "2.25"]),
    intercept=st.integers(-2000, 2000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", None]),
    inverted=st.booleans(),
    rest=st.integers(0, 15),
)
@settings(max_examples=80, deadline=None)
def test_windows_follow_the_standard(stored, centre, width, slope, intercept, function, inverted, rest):
    """Signed, 12 of 16 bits, with anything in the other four."""
    patterns = (np.array(stored).reshape(3, 4) & 0xFFF | rest << 12).astype("u2").view("i2")
    data = written(
        patterns,
        BitsStored=12,
        PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2",
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        WindowCenter=(centre / 10, 7),
        WindowWidth=(width / 10, 9),
        VOILUTFunction=function,
    )
    expected = [standard(v * float(slope) + intercept, centre / 10, width / 10, function or "LINEAR") for v in stored]
    expected = [255 - value for value in expected] if inverted else expected
    assert abs(grey(data).ravel() - np.array(expected)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2"])
def test_every_type_in_every_byte_order(syntax, kind):
    info = np.iinfo(kind)
    values = ramp(info.min, info.max, kind)
    assert np.array_equal(grey(written(values, syntax)), spread(values.astype(float)))
    inverted = written(values, syntax, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(grey(inverted), 255 - spread(values.astype(float)))


def test_single_bits():
    bits = np.random.default_rng(0).integers(0, 2, (5, 7))
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    data = written(packed, Rows=5, Columns=7, BitsAllocated=1, PixelRepresentation=0)
    assert np.array_equal(grey(data), bits * 255)


def test_a_negative_slope_turns_the_picture_over():
    values = ramp(0, 1000)
    assert np.array_equal(grey(written(values, RescaleSlope=-1, RescaleIntercept=0)), 255 - spread(values))


def test_a_picture_of_one_value_is_black():
    assert (grey(written(np.full((3, 4), 9, "u1"))) == 0).all()


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(syntax, photometric):
    values = ramp(0, 100)
    padded = values.copy()
    padded[0, :2] = -2000, -1990
    tags = {"PhotometricInterpretation": photometric, "PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1980}
    kept = values[padded >= 0].astype(float)
    expected = spread(kept) if photometric == "MONOCHROME2" else 255 - spread(kept)
    result = grey(written(padded, syntax, **tags))
    assert (result[0, :2] == 0).all()
    assert np.array_equal(result[padded >= 0], expected)
    assert (grey(written(padded, syntax, WindowCenter=-2000, WindowWidth=10, **tags))[0, :2] == 0).all()


def test_padding_of_signed_pixels_may_be_written_unsigned():
    values = ramp(0, 100)
    values[0, 0] = -2000
    data = written(values, PixelPaddingValue=-2000).replace(b"\x28\x00\x20\x01SS", b"\x28\x00\x20\x01US")
    assert grey(data)[0, 0] == 0
    assert np.array_equal(grey(data), grey(written(values, PixelPaddingValue=-2000)))


def test_a_picture_of_padding_alone_is_black():
    assert (grey(written(np.full((3, 4), 7, "u2"), PixelPaddingValue=7)) == 0).all()


def lut(entries: list[int], first: int, depth: int) -> tuple[dict[str, object], ...]:
    data = np.array(entries, "<u2").tobytes()
    return ({"LUTDescriptor": (len(entries) % 2**16, first, depth), "LUTData": data},)


@pytest.mark.parametrize(("depth", "count"), [(8, 256), (8, 1024), (10, 64), (12, 4096), (16, 300)])
@pytest.mark.parametrize("first", [0, 20])
def test_voi_tables(depth, count, first):
    entries = np.random.default_rng(depth).integers(0, 2**depth, count)
    values = ramp(0, 5000, "u2")
    data = written(values, VOILUTSequence=lut(entries.tolist(), first, depth), WindowCenter=5, WindowWidth=2)
    expected = entries[np.clip(values.astype(int) - first, 0, count - 1)] / (2**depth - 1) * 255
    assert abs(grey(data) - expected).max() <= 0.5 + 1e-6


def test_a_voi_table_that_begins_below_zero():
    entries = np.arange(0, 1024, 4)
    data = written(ramp(-300, 300), VOILUTSequence=lut(entries.tolist(), -100, 10))
    expected = entries[np.clip(ramp(-300, 300).astype(int) + 100, 0, 255)] / 1023 * 255
    assert abs(grey(data) - expected).max() <= 0.5 + 1e-6


def test_a_modality_table_comes_before_the_window():
    entries = np.random.default_rng(3).permutation(500) * 10
    values = ramp(0, 499, "u2")
    tags = {"ModalityLUTSequence": lut(entries.tolist(), 0, 16), "WindowCenter": 2000, "WindowWidth": 1000}
    expected = [[standard(int(entries[value]), 2000, 1000) for value in row] for row in values]
    assert abs(grey(written(values, **tags)) - np.array(expected)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 40},
        {"WindowWidth": 40},
        {"WindowCenter": 40, "WindowWidth": 0},
        {"WindowCenter": 40, "WindowWidth": -5},
        {"WindowCenter": 40, "WindowWidth": "nan"},
        {"WindowCenter": "1e400", "WindowWidth": 40},
        {"WindowCenter": 40, "WindowWidth": 40, "VOILUTFunction": "CUBIC"},
        {"RescaleSlope": 2},
        {"RescaleIntercept": 2},
        {"RescaleSlope": "inf", "RescaleIntercept": 0},
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"VOILUTSequence": lut([1, 2, 3], 0, 20)},
        {"VOILUTSequence": ({"LUTDescriptor": (300, 0, 16), "LUTData": bytes(20)},)},
        {"VOILUTSequence": ({"LUTDescriptor": (300, 0)},)},
        {"ModalityLUTSequence": lut([1, 2, 3], 0, 12)},
    ],
)
def test_windows_and_tables_that_mean_nothing_are_refused(tags):
    fails(written(ramp(0, 100), **tags), dicom.TABLE)


def test_empty_windows_are_none():
    assert np.array_equal(
        grey(written(ramp(0, 100), WindowCenter="", WindowWidth="", VOILUTFunction="")), spread(ramp(0, 100))
    )


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2", "RGB"])
def test_windows_change_no_colours(photometric):
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype="u1")
    data = written(colours, WindowCenter=5, WindowWidth=2, RescaleSlope=3, RescaleIntercept=1)
    assert np.array_equal(run(data).pixels, colours)
    wrong = written(colours, PhotometricInterpretation=photometric)
    fails(wrong, pictures.DEPTH) if photometric != "RGB" else run(wrong)


# --- colours


def rgb_of(ybr: np.ndarray) -> np.ndarray:
    """PS3.3 C.7.6.3.1.2, solved for red, green and blue."""
    forward = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return np.clip((ybr - np.array([0, 128, 128])) @ np.linalg.inv(forward).T, 0, 255)


def test_planes_one_after_another():
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype="u1")
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "BitsAllocated": 8, "PixelRepresentation": 0}
    data = written(colours.transpose(2, 0, 1).tobytes(), Rows=3, Columns=4, PlanarConfiguration=1, **tags)
    assert np.array_equal(run(data).pixels, colours)


def test_luminance_and_chrominance():
    ybr = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype="u1")
    result = run(written(ybr, PhotometricInterpretation="YBR_FULL")).pixels
    assert abs(result - rgb_of(ybr)).max() < 1


def test_chrominance_of_every_other_pixel():
    ybr = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype="u1")
    ybr[:, 1::2, 1:] = ybr[:, ::2, 1:]
    packed = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], axis=-1).tobytes()
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8, "PixelRepresentation": 0}
    tags |= {"PhotometricInterpretation": "YBR_FULL_422", "Rows": 4}
    assert abs(run(written(packed, Columns=6, **tags)).pixels - rgb_of(ybr)).max() < 1
    fails(written(packed, Columns=5, **tags), dicom_checks.COLOUR)
    fails(written(packed[:-4], Columns=6, **tags), dicom_checks.LENGTH)


@pytest.mark.parametrize(("stored", "kind"), [(8, "u1"), (5, "u1"), (12, "u2"), (16, "u2")])
def test_colours_of_any_depth(stored, kind):
    colours = np.random.default_rng(0).integers(0, 2**stored, (3, 4, 3)).astype(kind)
    assert np.array_equal(run(written(colours, BitsStored=stored)).pixels, np.rint(colours / (2**stored - 1) * 255))


@pytest.mark.parametrize(("depth", "wide"), [(8, False), (8, True), (16, True)])
def test_palettes(depth, wide):
    palette = np.random.default_rng(0).integers(0, 2**depth, (200, 3))
    tags: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR", "SOPClassUID": US}
    for index, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = (200, 10, depth)
        tags[f"{name}PaletteColorLookupTableData"] = palette[:, index].astype("<u2" if wide else "u1").tobytes()
    values = ramp(0, 255, "u1")
    chosen = palette[np.clip(values.astype(int) - 10, 0, 199)]
    assert np.array_equal(run(written(values, **tags)).pixels, np.rint(chosen / (257 if depth == 16 else 1)))
    short = tags | {"BluePaletteColorLookupTableData": bytes(20)}
    fails(written(values, **short), dicom.TABLE)
    if wide:
        fails(written(values, BIG, **tags), dicom_checks.COLOUR)


def test_palettes_that_could_only_be_guessed_at_are_refused():
    values = ramp(0, 255, "u1")
    fails(written(values, PhotometricInterpretation="PALETTE COLOR"), dicom.TABLE)
    many = {"RedPaletteColorLookupTableDescriptor": (300, 0, 8), "RedPaletteColorLookupTableData": bytes(300)}
    fails(written(values, PhotometricInterpretation="PALETTE COLOR", **many), dicom_checks.COLOUR)


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": "HSV"},
        {"PhotometricInterpretation": "YBR_PARTIAL_420"},
        {"PhotometricInterpretation": "YBR_ICT"},
        {"PhotometricInterpretation": None},
        {"PhotometricInterpretation": ("RGB", "RGB")},
        {"PixelRepresentation": 1},
        {"SamplesPerPixel": 4},
        {"PhotometricInterpretation": "YBR_FULL", "BitsStored": 7},
    ],
)
def test_colours_that_could_only_be_guessed_at_are_refused(tags):
    fails(written(np.zeros((3, 4, 3), "u1"), **tags), dicom_checks.COLOUR)


# Colour JPEG: what says which colours it holds, and what the header says.
def jpeg(marker: str) -> tuple[np.ndarray, bytes]:
    colours = np.zeros((32, 32, 3), "u1")
    colours[:16, :, 0], colours[16:, :, 2], colours[:, :16, 1] = 200, 180, 90
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "JPEG", quality=95, subsampling=0, keep_rgb=marker == "rgb")
    whole = buffer.getvalue()
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    plain = whole[:2] + whole[20:]  # without JFIF's marker
    return colours, {"rgb": whole, "jfif": whole, "none": plain, "adobe": whole[:2] + adobe + plain[2:]}[marker]


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "YBR_FULL", "RGB"])
@pytest.mark.parametrize("marker", ["rgb", "jfif", "none", "adobe"])
def test_jpeg_says_its_own_colours(marker, photometric):
    if marker == "none" and photometric == "RGB":
        pytest.skip("the header is all there is, and it is wrong")
    colours, stream = jpeg(marker)
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8, "PixelRepresentation": 0}
    data = written([stream], JPEG, Rows=32, Columns=32, PhotometricInterpretation=photometric, **tags)
    assert abs(run(data).pixels - colours.astype(int)).max() <= 3


# --- layouts, sizes and lengths


@pytest.mark.parametrize(
    "tags",
    [
        {"BitsAllocated": 32},
        {"BitsAllocated": 12},
        {"BitsAllocated": 64},
        {"BitsStored": 0},
        {"BitsStored": 17},
        {"BitsStored": 12, "HighBit": 15},
        {"PixelRepresentation": 2},
        {"SamplesPerPixel": 3},
    ],
)
def test_layouts_that_could_only_be_guessed_at_are_refused(tags):
    fails(written(ramp(0, 100), **tags), pictures.DEPTH)


@pytest.mark.parametrize(
    "tags",
    [
        {"Rows": 0},
        {"Columns": 0},
        {"Rows": None},
        {"Rows": (3, 4)},
        {"PixelRepresentation": None},
        {"SamplesPerPixel": None},
        {"NumberOfFrames": 0},
        {"NumberOfFrames": "-1"},
        {"NumberOfFrames": "1A"},
        {"NumberOfFrames": "1.5"},
        {"NumberOfFrames": ("1", "1")},
    ],
)
def test_counts_that_mean_nothing_are_refused(tags):
    data = written(ramp(0, 100), **({"BitsAllocated": 16} | tags)) if "PixelRepresentation" not in tags else None
    fails(
        data or written(ramp(0, 100), PixelRepresentation=0).replace(b"\x28\0\x03\x01US", b"\x28\0\x04\x01US"),
        pictures.DAMAGED,
    )


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_is_refused(keyword):
    data = written(ramp(0, 100))
    at = data.index(b"\xe0\x7f\x10\x00OW")
    kind = {"FloatPixelData": b"\x08\x00OF", "DoubleFloatPixelData": b"\x09\x00OD"}[keyword]
    fails(data[:at] + b"\xe0\x7f" + kind + data[at + 6 :], pictures.DEPTH)


@pytest.mark.parametrize("kind", ["1.2.840.10008.5.1.4.1.1.88.11", "1.2.3.4", "1.2.840.10008.5.1.4.1.1.2.1", ""])
def test_other_kinds_are_refused(kind):
    fails(written(ramp(0, 100), SOPClassUID=kind or "1.2"), dicom_checks.KIND)


def test_values_that_stand_in_groups_of_frames_are_not_overlooked():
    groups = ({"RescaleSlope": 5},)
    fails(written(ramp(0, 100), NumberOfFrames=1, SharedFunctionalGroupsSequence=groups), dicom_checks.KIND)


@pytest.mark.parametrize(("rows", "columns"), [(65535, 65535), (65535, 16), (1001, 1000)])
def test_size_is_read_before_any_pixel(rows, columns):
    start = time.process_time()
    data = written(b"\0" * 20, Rows=rows, Columns=columns, BitsAllocated=16, PixelRepresentation=0)
    fails(data, pictures.LARGE)
    assert dicom.announced(io.BytesIO(data)) == rows * columns
    assert time.process_time() - start < 0.2


def test_the_limit_counts_pixels():
    data = written(ramp(0, 100))
    fails(data, pictures.LARGE, limit=11)
    run(data, limit=12)


@pytest.mark.parametrize("change", [{"Rows": 2}, {"Rows": 4}, {"Columns": 3}, {"Columns": 5}, {"BitsAllocated": 8}])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
def test_pixels_of_another_size_are_refused(syntax, change):
    fails(written(ramp(0, 100), syntax, **change), dicom_checks.LENGTH)


@pytest.mark.parametrize(
    "name", ["MR_small", "MR_small_implicit", "MR_small_RLE", "MR_small_jp2klossless", "SC_rgb_rle"]
)
def test_no_file_that_is_cut_short_is_half_a_picture(name):
    data = bundled(f"{name}.dcm")
    at = dicom_checks.read_header(data, ()).start
    tail = len(data) - at
    for keep in sorted({at, at + 1, at + 8, *(at + tail * i // 20 for i in range(20))}):
        fails(data[:keep], dicom_checks.LENGTH)


@pytest.mark.parametrize("name", ["MR_small", "MR_small_RLE", "SC_rgb_jpeg_dcmtk"])
def test_every_flip_of_a_length_of_the_pixels_is_refused(name):
    data = bundled(f"{name}.dcm")
    at = dicom_checks.read_header(data, ()).start - 4
    for bit in range(32):
        flipped = bytearray(data)
        flipped[at + bit // 8] ^= 1 << bit % 8
        fails(bytes(flipped), dicom_checks.LENGTH)


def tiny_jpeg(height: int = 8, width: int = 8, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 77).save(buffer, "JPEG")
    return buffer.getvalue()


def capsule(*fragments: bytes, syntax: str = JPEG, **tags: object) -> bytes:
    base = {"Rows": 8, "Columns": 8, "BitsAllocated": 8, "PixelRepresentation": 0}
    return written([*fragments], syntax, **(base | tags))


def test_a_frame_may_come_in_fragments():
    stream = tiny_jpeg()
    assert run(capsule(stream)).width == 8
    assert run(capsule(stream[:100], stream[100:200], stream[200:])).width == 8
    assert run(capsule(stream + b"\0")).width == 8


def test_frames_of_another_number_or_size_are_refused():
    stream = tiny_jpeg()
    whole = capsule(stream)
    cases = {
        "no end": whole[:-8],
        "no last byte": whole[:-1],
        "another end": whole[:-8] + b"\xfe\xff\x0d\xe0\0\0\0\0",
        "no frame": capsule(),
        "two frames": capsule(stream, stream),
        "cut stream": capsule(stream[:-10]),
        "other rows": capsule(tiny_jpeg(16, 8)),
        "turned": capsule(tiny_jpeg(4, 16)),
        "colour": capsule(tiny_jpeg(mode="RGB")),
        "a bomb": capsule(stream.replace(b"\x08\x00\x08\x00\x08", b"\x08\xff\xdc\xff\xdc")),
        "no stream": capsule(b"\xff\xd8\xff" + bytes(50) + b"\xff\xd9"),
        "two offsets": whole.replace(b"\xfe\xff\x00\xe0\0\0\0\0", b"\xfe\xff\x00\xe0\x08\0\0\0" + bytes(8)),
        "as if uncompressed": whole.replace(JPEG.encode(), EXPLICIT.encode().ljust(len(JPEG), b"\0")),
    }
    for name, data in cases.items():
        with pytest.raises(BadImageError) as caught:
            dicom.decode_dicom(data, (8, 8), max_pixels=LIMIT)
        assert str(caught.value) == dicom_checks.LENGTH, name


def test_passes_of_a_jpeg_are_counted():
    stream = tiny_jpeg()
    at = stream.index(b"\xff\xda")
    fails(capsule(stream[:at] + stream[at:-2] * 101 + stream[-2:]), pictures.SCANS)


def test_wavelets_that_are_not_the_colours_of_the_header_are_refused():
    data = bundled("examples_jpeg2k.dcm")
    at = data.index(b"\xff\x52\x00\x0c")
    assert data[at + 8] == 1
    fails(data[: at + 8] + b"\0" + data[at + 9 :], dicom_checks.COLOUR)


def test_runs_are_followed_before_they_are_unfolded():
    def frame(segment: bytes) -> bytes:
        return struct.pack("<16L", 1, 64, *[0] * 14) + segment

    assert (run(capsule(frame(b"\xc1\x07"), syntax=RLE)).pixels == 0).all()  # 64 times 7
    fails(capsule(frame(b"\xc2\x07"), syntax=RLE), dicom_checks.LENGTH)
    fails(capsule(frame(b"\xc0\x07"), syntax=RLE), dicom_checks.LENGTH)
    start = time.process_time()
    fails(capsule(frame(b"\x81\x07" * 2_000_000), syntax=RLE), dicom_checks.LENGTH)  # half a gigabyte
    assert time.process_time() - start < 0.5


def test_sequences_of_more_items_than_a_header_has_are_refused():
    item = b"\xfe\xff\x00\xe0" + bytes(4)
    data = written(ramp(0, 100))
    bomb = b"\x08\x00\x40\x11SQ\0\0" + struct.pack("<L", 8 * 20_000) + item * 20_000
    at = data.index(b"\x28\x00\x02\x00US")
    start = time.process_time()
    fails(data[:at] + bomb + data[at:], pictures.HEAVY)
    assert time.process_time() - start < 0.3


def test_no_more_of_a_header_is_read_than_one_has(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "BYTES_BESIDE", 4000)
    data = written(ramp(0, 100), **{"ImageComments": "x" * 5000})
    path = tmp_path / "x.dcm"
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(BadImageError, match=pictures.HEAVY):
        dicom.announced(file)
    path.write_bytes(written(np.zeros((100, 100), "u1")))
    with path.open("rb") as file:
        assert dicom.announced(file) == 10_000
        assert file.tell() == 4000


@pytest.mark.parametrize(
    ("tags", "size"),
    [
        ({"PixelSpacing": ("0.5", "0.5")}, None),
        ({"PixelSpacing": ("1.002", "1")}, None),
        ({"PixelSpacing": ("1.5", "0.5")}, (60, 30)),
        ({"ImagerPixelSpacing": ("1", "2")}, (20, 60)),
        ({"PixelAspectRatio": ("1", "2")}, (20, 60)),
        ({"PixelSpacing": ("1", "1"), "PixelAspectRatio": ("1", "2")}, None),
    ],
)
def test_pixels_become_square(tags, size):
    values = np.random.default_rng(0).integers(0, 256, (20, 30), dtype="u1")
    values[0, :2] = 0, 255
    result = dicom.decode_dicom(written(values, **tags), size or (20, 30), max_pixels=LIMIT)
    expected = Image.fromarray(values) if size is None else Image.fromarray(values).resize(size[::-1])
    assert np.array_equal(result.pixels[..., 0], np.asarray(expected))
    assert (result.width, result.height) == (30, 20)


@pytest.mark.parametrize("spacing", [("0", "1"), ("1", "-1"), ("nan", "1"), ("1", "inf"), ("1",), ("1", "1", "1")])
def test_spacings_that_mean_nothing_are_refused(spacing):
    fails(written(ramp(0, 100), PixelSpacing=spacing), dicom.SPACING)


def test_spacings_do_not_get_round_the_limit():
    fails(written(ramp(0, 100), PixelSpacing=("1", "1000000")), pictures.LARGE)


# --- privacy


CANARY = "CANARY^4711"


def test_what_is_counted_for_the_data_sheet():
    clean = {"PatientIdentityRemoved": "YES", "BurnedInAnnotation": "NO"}
    named = {"PatientName": CANARY, "PatientID": "", "PatientBirthDate": ""}
    cases = [
        (clean | {"SOPClassUID": CT, "PatientName": "", "PatientID": " ", "PatientBirthDate": ""}, ()),
        (clean | {"SOPClassUID": US}, ()),
        ({"SOPClassUID": CT, "Modality": "CT"}, (dicom.NOT_CLEARED,)),
        ({"SOPClassUID": US, "Modality": "US", "PatientIdentityRemoved": "YES"}, (dicom.BURNED_IN,)),
        ({"SOPClassUID": CAPTURE, "PatientIdentityRemoved": "YES"}, (dicom.BURNED_IN,)),
        (
            {"SOPClassUID": CT, "BurnedInAnnotation": "YES", "PatientIdentityRemoved": "NO"},
            (dicom.BURNED_IN, dicom.NOT_CLEARED),
        ),
        (clean | named | {"SOPClassUID": CT}, (dicom.NAMED,)),
        (clean | {"SOPClassUID": CT, "PatientID": "7"}, (dicom.NAMED,)),
        (clean | {"SOPClassUID": CT, "PatientBirthDate": "19700101"}, (dicom.NAMED,)),
    ]
    for tags, expected in cases:
        assert dicom.notes(written(ramp(0, 100), **tags)) == expected, tags
    program = b"MZ" + written(ramp(0, 100), **(clean | {"SOPClassUID": CT}))[2:]
    assert dicom.notes(program) == (dicom.PROGRAM,)
    found = [note for tags, _ in cases for note in dicom.notes(written(ramp(0, 100), **tags))]
    assert dicom.note_warnings("st_mary", Counter(found))[0] == f"st_mary: 2 DICOM files {dicom.NOT_CLEARED}."


def test_no_tag_is_said_in_reasons_or_logged(caplog):
    caplog.set_level(logging.DEBUG)
    names = {"PatientName": CANARY, "PatientID": CANARY, "StudyDescription": CANARY, "NumberOfFrames": CANARY}
    for tags in ({}, {"WindowWidth": CANARY, "WindowCenter": 1}, {"SOPClassUID": CANARY}, {"PixelSpacing": CANARY}):
        with pytest.raises(BadImageError) as caught:
            dicom.decode_dicom(written(ramp(0, 100), **(names | tags)), (8, 8), max_pixels=LIMIT)
        assert CANARY not in str(caught.value)
    with pytest.raises(BadImageError) as caught:
        dicom.notes(written(ramp(0, 100)).replace(EXPLICIT.encode(), CANARY.encode() + b"1.2.3.45"))
    assert CANARY not in str(caught.value)
    assert caplog.records == []


def test_what_pydicom_raises_becomes_a_reason_without_its_words(monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError(CANARY)

    monkeypatch.setattr(dicom_checks, "read_header", fail)
    fails(b"", pictures.DAMAGED)


def test_patients_are_known_apart_but_not_known():
    salt = b"0123456789abcdef"
    one, same, other = (written(ramp(0, 100), PatientID=number) for number in ("4711", "4711 ", "4712"))
    key = dicom.patient_key(one, salt)
    assert key is not None
    assert len(key) == 64
    assert dicom.patient_key(same, salt) == key
    assert dicom.patient_key(other, salt) != key
    assert dicom.patient_key(one, salt[::-1]) != key
    assert dicom.patient_key(written(ramp(0, 100), PatientID="4711", IssuerOfPatientID="B"), salt) != key
    pairs = [written(ramp(0, 100), PatientID=number, IssuerOfPatientID=by) for number, by in (("12", "A"), ("2", "A1"))]
    assert dicom.patient_key(pairs[0], salt) != dicom.patient_key(pairs[1], salt)
    assert dicom.patient_key(written(ramp(0, 100), PatientID=" "), salt) is None
    assert dicom.patient_key(written(ramp(0, 100)), salt) is None
    with pytest.raises(ValueError, match="16 bytes"):
        dicom.patient_key(one, b"short")


def test_versions_of_decoders_are_named():
    assert f"pydicom {pydicom.__version__}" in dicom_checks.decoders().split(", ")


# --- damage, warnings, threads


def mutants(data: bytes, count: int) -> list[bytes]:
    generator = np.random.default_rng(1)
    made = []
    for index in range(count):
        changed = bytearray(data)
        span = len(data) if index % 3 == 0 else 6500  # two of three: the header
        kind = index % 5
        at = int(generator.integers(0, span))
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at : at + int(generator.integers(1, 200))] = b""
        elif kind == 2:
            changed[at:at] = generator.bytes(int(generator.integers(1, 50)))
        else:
            for place in generator.integers(132, span, 8):
                changed[place] ^= 1 << int(generator.integers(0, 8))
        made.append(bytes(changed))
    return made


def outcome(data: bytes) -> str:
    try:
        result = dicom.decode_dicom(data, (16, 24), max_pixels=LIMIT)
        if len(data) % 5 == 0:
            dicom.notes(data)
            dicom.patient_key(data, bytes(16))
    except BadImageError as error:
        return str(error)
    assert result.pixels.shape == (16, 24, 3)
    header = dicom_checks.read_header(data, ("Rows", "Columns"))
    assert (result.height, result.width) == (header.tags.Rows, header.tags.Columns)
    return "image"


def test_damaged_files_decode_or_are_refused_and_nothing_else(capfd):
    reasons = {outcome(data) for data in mutants(bundled("CT_small.dcm"), 300)}
    assert "image" in reasons
    assert len(reasons) > 5
    assert capfd.readouterr() == ("", "")


def test_threads_leave_filters_and_levels_as_they_were():
    logger = logging.getLogger("pydicom")
    before, level = list(warnings.filters), logger.level
    loud = written(
        ramp(0, 100), PatientBirthDate="no date", StudyInstanceUID="x.y", PixelSpacing="0.1234567890123456789\\1"
    )
    files = [loud, bundled("MR_small_padded.dcm"), bundled("badVR.dcm"), bundled("MR_small_RLE.dcm")] * 10
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(outcome, files))
    assert list(warnings.filters) == before
    assert logger.level == level


def test_warnings_of_others_pass_meanwhile():
    with dicom._reading(), pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours", stacklevel=1)


def test_files_of_one_patient_are_in_one_split(tmp_path):
    numbers = ["11", "11", "12", "12", "13", "13", "14", "14", "15", "15", "", ""]
    for site in ("north", "south"):
        for index, number in enumerate(numbers):
            folder = tmp_path / "data" / site / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            content = written(
                ramp(index, 100 + index + 7 * (site == "south")), PatientID=site[0] * bool(number) + number
            )
            (folder / f"{index}.dcm").write_bytes(content)
    options = DataOptions(val=0.2, test=0.3)
    found = [
        load_federation(tmp_path / "data", options=options, image_size=(8, 8), seed=0, cache=tmp_path / "cache")
        for _ in range(2)
    ]
    assert found[0].digest == found[1].digest  # the salt, which is new each time, decides nothing
    for site in found[0].sites:
        assert np.isin(site.groups, list(site.named)).sum() == 10  # all but the two without a number
        assert sorted(np.bincount(np.unique(site.groups, return_inverse=True)[1]).tolist()) == [1, 1, 2, 2, 2, 2, 2]
        for group in np.unique(site.groups):
            assert len(set(site.split[site.groups == group].tolist())) == 1
    assert not any("No patient is named" in warning for warning in found[0].sheet["warnings"])

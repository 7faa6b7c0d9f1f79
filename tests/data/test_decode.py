from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from data_files import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from confrere.data import decode as module
from confrere.data.decode import BadImageError, Decoded, decode

LIMIT = 50_000_000


def run(data: bytes, size: tuple[int, int] = (20, 24)) -> Decoded:
    return decode(data, size, max_pixels=LIMIT)


def fails(data: bytes, reason: str, limit: int = LIMIT) -> None:
    with pytest.raises(BadImageError) as caught:
        decode(data, (20, 24), max_pixels=limit)
    assert str(caught.value) == reason


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_lossless_pictures_of_the_right_size_are_unchanged(kind):
    result = run(encoded(picture(), kind))
    assert np.array_equal(result.pixels, np.asarray(picture()))
    assert (result.format, result.width, result.height) == (kind, 24, 20)


def test_jpeg_is_read():
    assert run(encoded(picture(), "JPEG")).format == "JPEG"


def test_resizing_covers_and_cuts_at_the_centre():
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 15:25] = 200
    result = run(encoded(Image.fromarray(wide)), (10, 10))
    assert result.pixels.shape == (10, 10, 3)
    assert (result.pixels[:, 1:-1] == 200).all()


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture()
    result = run(encoded(image, "PNG", exif=exif), (24, 20))
    assert np.array_equal(result.pixels, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))
    assert (result.width, result.height) == (20, 24)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(kind):
    levels = np.linspace(0, 65535, 480).astype(np.uint16).reshape(20, 24)
    result = run(encoded(Image.fromarray(levels), kind))
    assert np.array_equal(result.pixels[..., 0], np.round(levels / 257.0).astype(np.uint8))


def test_alpha_is_laid_over_black():
    pixels = np.full((20, 24, 4), 200, dtype=np.uint8)
    pixels[..., 3] = 128
    pixels[:10, :, 3] = 0
    result = run(encoded(Image.fromarray(pixels))).pixels
    assert (result[:10] == 0).all()
    assert (abs(result[10:].astype(int) - 100) <= 1).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_png_modes(mode):
    image = picture(mode=mode)
    assert np.array_equal(run(encoded(image)).pixels, np.asarray(image.convert("RGB")))


def test_transparent_palette_colour_becomes_black():
    image = Image.new("P", (24, 20), 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    assert (run(encoded(image, "PNG", transparency=1)).pixels == 0).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    assert run(encoded(picture(mode="CMYK"), kind)).pixels.shape == (20, 24, 3)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_other_depths_are_refused(mode):
    fails(encoded(Image.new(mode, (24, 20)), "TIFF"), module.DEPTH)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_several_frames_are_refused(kind):
    frames = [picture(1), picture(2)]
    fails(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), module.FRAMES)


@pytest.mark.parametrize("data", [b"GIF89a" + bytes(50), b"%PDF-1.4", b"text", b"II+\0" + bytes(50)])
def test_other_formats_are_refused(data):
    fails(data, module.FOREIGN)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP"])
def test_other_image_formats_are_refused_whatever_their_name(kind):
    fails(encoded(picture(), kind), module.FOREIGN)


def test_empty_file_is_refused():
    fails(b"", module.EMPTY)


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 13_000, 20_000, 2**31 - 1])
def test_bombs_are_refused_by_their_header(side):
    start = time.perf_counter()
    fails(bomb(side), module.LARGE)
    assert time.perf_counter() - start < 0.2


def test_the_limit_counts_pixels():
    fails(encoded(picture()), module.LARGE, limit=20 * 24 - 1)
    decode(encoded(picture()), (20, 24), max_pixels=20 * 24)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_never_half_images(kind, share):
    data = encoded(picture(size=(80, 80)), kind)
    fails(data[: int(len(data) * share)], module.DAMAGED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files_decode_or_are_refused_and_nothing_else(kind, data):
    whole = bytearray(encoded(picture(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(whole)))
    known = {module.DAMAGED, module.FOREIGN, module.LARGE, module.FRAMES, module.DEPTH}
    try:
        outcome = run(bytes(whole[:cut])).pixels.shape
    except BadImageError as error:
        outcome = str(error)
    assert outcome == (20, 24, 3) or outcome in known


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=30, deadline=None)
def test_every_size_gives_the_size_asked_for(height, width, size):
    buffer = io.BytesIO()
    Image.new("L", (width, height), 77).save(buffer, "PNG")
    result = run(buffer.getvalue(), size).pixels
    assert result.shape == (*size, 3)
    assert (result == 77).all()


def test_the_histogram_counts_every_pixel_of_the_original():
    image = picture(size=(30, 50))
    histogram = run(encoded(image), (8, 8)).histogram
    expected = [np.bincount(np.asarray(image)[..., channel].ravel(), minlength=256) for channel in range(3)]
    assert np.array_equal(histogram, expected)

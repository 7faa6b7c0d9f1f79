"""Pictures: wrong kinds, cut short, bombs, polyglots, and odd ones that are fine."""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from hostile_case import Base, Case, accepted, encoded, federation, link, picture, pipe, refused, sparse, write
from PIL import Image

FOREIGN, DAMAGED, LARGE = "not a PNG, JPEG, TIFF or DICOM", "damaged or truncated", "more pixels than max_pixels"
PNG = b"\x89PNG\r\n\x1a\n"
EIGHT = ((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1))  # TIFF tags of 8 x 8 grey pixels


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int, depth: int = 1, colour: int = 0, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*chunks: bytes) -> bytes:
    return PNG + b"".join(chunks) + chunk(b"IEND", b"")


def pixels(width: int, height: int) -> bytes:
    """Return all rows of a black 1-bit picture, compressed without holding them."""
    row, packer = bytes(1 + (width + 7) // 8), zlib.compressobj(9)
    return b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])


def bomb(side: int) -> bytes:
    """Return a whole PNG of ``side`` x ``side`` black pixels; 13,000 take 20 KB."""
    return png(header(side, side), chunk(b"IDAT", pixels(side, side)))


def tiff(*tags: tuple[int, int, int, int], after: int = 0) -> bytes:
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", after)


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose first pass is repeated."""
    whole = encoded(picture(51, 64), "JPEG", progressive=True)
    first = whole.index(b"\xff\xda")
    second = whole.index(b"\xff\xda", first + 2)
    return whole[:first] + whole[first:second] * count + whole[second:]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../evil.sh", "exit 1")
    return buffer.getvalue()


def sixteen(kind: str) -> bytes:
    return encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000), kind)


def _foreign() -> dict[str, bytes]:
    return {
        "gif": encoded(picture(), "GIF"),
        "gif-animated": encoded(picture(51), "GIF", save_all=True, append_images=[picture(52)]),
        "webp": encoded(picture(), "WEBP"),
        "bmp": encoded(picture(), "BMP"),
        "ico": encoded(picture(0, 16), "ICO"),
        "jpeg-2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(40),
        "bigtiff": b"II+\0" + bytes(60),
        "pdf": b"%PDF-1.7\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
        "html": b"<html><script>alert(1)</script>",
        "text": b"no image",
        "zip": zipped(),
        "gzip": b"\x1f\x8b\x08" + bytes(40),
        "elf": b"\x7fELF" + bytes(60),
        "exe": b"MZ" + bytes(60) + encoded(picture()),
        "shell": b"#!/bin/sh\nexit 1\n",
        "pickle": pickle.dumps({"a": 1}),
        "numpy": b"\x93NUMPY\x01\x00" + bytes(40),
        "one-byte": b"\x89",
        "png-in-text-mode": encoded(picture()).replace(b"\r\n", b"\n"),
    }


def _damaged() -> Iterator[tuple[str, bytes]]:
    for kind in ("PNG", "JPEG", "TIFF"):
        whole = encoded(picture(51, 64), kind)
        for share in (10, 50, 95):
            yield f"{kind.lower()}-cut-at-{share}", whole[: len(whole) * share // 100]
        yield f"{kind.lower()}-magic-only", whole[:8]
        yield f"{kind.lower()}-noise", whole[:8] + np.random.default_rng(1).bytes(500)
    yield "png-no-pixels", png(header(8, 8))
    yield "png-no-header", png(chunk(b"IDAT", zlib.compress(bytes(80))))
    yield "png-depth-3", png(header(8, 8, depth=3), chunk(b"IDAT", zlib.compress(bytes(80))))
    yield "png-no-such-colour", png(header(8, 8, 8, 5), chunk(b"IDAT", zlib.compress(bytes(80))))
    yield "png-broken-stream", png(header(8, 8), chunk(b"IDAT", b"\x78\x9c" + bytes(30)))
    yield "png-wrong-checksum", PNG + header(8, 8)[:-4] + b"\0\0\0\0" + chunk(b"IEND", b"")
    yield "png-endless-chunk", PNG + header(8, 8) + struct.pack(">I", 2**31 - 1) + b"IDAT"
    yield "png-text-bomb", png(header(8, 8), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 9)))
    yield "tiff-no-tags", tiff()
    yield "tiff-tags-beyond-the-end", b"II*\0" + struct.pack("<I", 2**31) + bytes(40)
    yield "tiff-strip-beyond-the-end", tiff(*EIGHT, (273, 4, 1, 2**31))
    yield "jpeg-no-scan", encoded(picture(), "JPEG").split(b"\xff\xda")[0]
    yield "jpeg-no-size", encoded(picture(), "JPEG").replace(b"\x11\x08\x00\x08\x00\x08", b"\x11\x08" + bytes(4))


def _large() -> dict[str, bytes]:
    big = ((256, 4, 1, 100_000), (257, 4, 1, 100_000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8))
    return {
        "png-169-mpx": bomb(13_000),
        "png-400-mpx": png(header(20_000, 20_000), chunk(b"IDAT", b"")),
        "png-2-to-the-62": png(header(2**31 - 1, 2**31 - 1), chunk(b"IDAT", b"")),
        "png-one-row": png(header(60_000_000, 1), chunk(b"IDAT", b"")),
        "tiff-10-gpx": tiff(*big),
        "jpeg-4-gpx": encoded(picture(), "JPEG").replace(b"\x08\x00\x08\x00\x08", b"\x08\xff\xdc\xff\xdc"),
    }


def _frames() -> dict[str, bytes]:
    pages = {"save_all": True, "append_images": [picture(52)]}
    return {
        "png-animated": encoded(picture(51), "PNG", **pages),
        "tiff-pages": encoded(picture(51), "TIFF", **pages),
    }


def _fine() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = Image.Exif()
    odd[0x0112] = 99
    whole = encoded(picture(51))
    return {
        "png-16-bit": sixteen("PNG"),
        "tiff-16-bit": sixteen("TIFF"),
        "jpeg-cmyk": encoded(picture(51, mode="CMYK"), "JPEG"),
        "tiff-cmyk": encoded(picture(51, mode="CMYK"), "TIFF"),
        "png-alpha": encoded(picture(51, mode="RGBA")),
        "png-grey-alpha": encoded(picture(51, mode="LA")),
        "png-palette": encoded(picture(51, mode="P"), transparency=0),
        "png-1-bit": encoded(picture(51, mode="1")),
        "jpeg-grey": encoded(picture(51, mode="L"), "JPEG"),
        "jpeg-progressive": encoded(picture(51, 64), "JPEG", progressive=True),
        "jpeg-turned": encoded(picture(51), "JPEG", exif=exif),
        "png-turned-nowhere": encoded(picture(51), exif=odd),
        "png-colour-profile": encoded(picture(51), icc_profile=b"not a profile"),
        "jpeg-comment-of-code": encoded(picture(51), "JPEG", comment=b"<?php system($_GET['c']); ?>"),
        "tiff-next-is-itself": tiff(*EIGHT, (273, 4, 1, 8), after=8),
        "png-and-zip": whole + zipped(),
        "png-named-jpg": whole,
    }


SPECIAL: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty": ("empty file", lambda path: write(path, b"")),
    "pipe": ("not an ordinary file", pipe),
    "socket": ("cannot be read", lambda path: _socket(path)),
    "link-out": ("link leading out", lambda path: link(path, "/etc/hostname")),
    "link-to-device": ("link leading out", lambda path: link(path, "/dev/zero")),
    "link-to-itself": ("cannot be read", lambda path: link(path, path.name)),
    "link-to-nothing": ("no such file", lambda path: link(path, "gone.png")),
    "folder": ("holds another folder", lambda path: path.mkdir()),
    "500-mb-of-nothing": (LARGE, lambda path: sparse(path, 500_000_000, PNG)),
    "20-mb-behind-the-end": ("more bytes than its pixels", lambda path: sparse(path, 20_000_000, encoded(picture(51)))),
    "jpeg-200-passes": ("more passes than a JPEG needs", lambda path: write(path, scans(200))),
    "tiff-float": ("pixel type not supported", lambda path: write(path, encoded(Image.new("F", (8, 8)), "TIFF"))),
    "tiff-32-bit": ("pixel type not supported", lambda path: write(path, encoded(Image.new("I", (8, 8)), "TIFF"))),
}


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # an address may be 107 bytes long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def _made(name: str, put: Callable[[Path], object]) -> Callable[[Path, Base], Path]:
    def make(folder: Path, base: Base) -> Path:
        root = federation(folder / "data")
        put(root / "a" / "x" / name)
        return root

    return make


def cases() -> Iterator[Case]:
    found: list[tuple[str, str, str | None, Callable[[Path], object]]] = []
    for reason, group in ((FOREIGN, _foreign()), (DAMAGED, dict(_damaged())), (LARGE, _large())):
        found += [(n, reason, "DataError", lambda p, c=c: write(p, c)) for n, c in group.items()]
    empty = bytes(128) + b"DICM" + bytes(40)
    found += [("dicom", "DICOM transfer syntax not supported", "DataError", lambda p: write(p, empty))]
    found += [(n, "animated or several pages", "DataError", lambda p, c=c: write(p, c)) for n, c in _frames().items()]
    found += [(n, "images=3", None, lambda p, c=c: write(p, c)) for n, c in _fine().items()]
    found += [(n, reason, "DataError", put) for n, (reason, put) in SPECIAL.items()]
    for name, says, error, put in found:
        file = "hostile.jpg" if name == "png-named-jpg" else "hostile.png"
        names, made = "a" if name == "folder" else file, _made(file, put)
        if error:
            yield refused(f"image/{name}", "picture", error, says, names, made)
        else:
            yield accepted(f"image/{name}", "picture", says, made)
    odd = {"formula": "=cmd().png", "line-end": "a\nb.png", "hidden": ".x.png", "markup": "[red]x.png"}
    for name, file in odd.items():
        says, made = "images=2" if name == "hidden" else "images=3", _made(file, _ordinary)
        yield accepted(f"image/name-{name}", "picture", says, made)


def _ordinary(path: Path) -> Path:
    return write(path, encoded(picture(51)))

"""Decoded pixels on disk: each registered file is decoded once, later runs map the array into memory.

An entry is ``<key>.npy`` (N, H, W, 3) uint8 with a JSON file beside it. The key covers the files' hashes and
all that decides their pixels, so an entry is never out of date; it holds no file names. A CRC-32 over pixels and facts
is compared whenever an entry is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from confrere import intake
from confrere.data.decode import SPECIAL, UNREADABLE, BadImageError, decode, read_picture
from confrere.data.dicom import is_dicom, notes
from confrere.data.dicom_checks import decoders
from confrere.data.mapped import Mapped, one_maker
from confrere.data.view import View
from confrere.errors import DataError

CHANGED = "changed while it was read"
DECODER = f"1|pillow {PIL.__version__}|{decoders()}"
"""What pixels depend on beside the file and the size."""
_BATCH = 256
_PASSING = {CHANGED, UNREADABLE, SPECIAL}  # said of a file that had been hashed just before: not of its contents


@dataclass(frozen=True, kw_only=True)
class Fact:
    """What the data sheet needs of one picture; ``mean`` and ``square`` are of all pixels, in 0..1, by channel.

    ``notes``: what a DICOM file should be warned of, in fixed phrases.
    """

    digest: str
    format: str
    width: int
    height: int
    mean: tuple[float, float, float]
    square: tuple[float, float, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One array, a fact for each of its rows (in order), and the hashes that do not decode, with reasons."""

    images: Mapped | View | NDArray[np.float32]
    facts: tuple[Fact, ...]
    bad: Mapping[str, str]


def workers() -> int:
    """Return how many threads read and decode: Pillow and hashing release the interpreter's lock."""
    return min(8, os.cpu_count() or 1)


def decoded(cache: Path, files: Mapping[str, Path], size: tuple[int, int], *, max_pixels: int) -> Entry:
    """Return the decoded pictures of ``{sha256: path}``, in the order of their hashes.

    Raises:
        DataError: the cache cannot be written.
    """
    digests = sorted(files)
    head = f"{DECODER}|{size[0]}x{size[1]}|{max_pixels}|"
    key = hashlib.sha256((head + "|".join(digests)).encode()).hexdigest()
    found = _load(cache, key, digests)
    if found is not None:
        return found
    try:
        with one_maker(cache):
            found = _load(cache, key, digests)  # another process may have made it meanwhile
            if found is not None:
                return found
            _write(cache, key, [(digest, files[digest]) for digest in digests], size, max_pixels)
    except OSError as error:
        megabytes = len(files) * size[0] * size[1] * 3 / 1e6
        raise DataError(
            f"cannot write the image cache: {error.strerror}",
            where=str(cache),
            fix=f"free {megabytes:.0f} MB there, or choose another cache folder",
            code="cache",
        ) from error
    fresh = _load(cache, key, digests, made=True)
    if fresh is None:
        raise DataError("the image cache changed while it was written", where=str(cache), fix="run again", code="cache")
    return fresh


def _load(cache: Path, key: str, digests: Sequence[str], *, made: bool = False) -> Entry | None:
    """Return a whole entry, or None when it is absent or damaged (it is then written anew).

    One that lacks a file for a passing reason serves only the process that ``made`` it.
    """
    try:
        meta = intake.parse_json(intake.read_bytes(cache / f"{key}.json", intake.MOST_JSON))
        images = Mapped(cache / f"{key}.npy")
        tuples = ("mean", "square", "notes")
        facts = tuple(Fact(**(fact | {k: tuple(fact[k]) for k in tuples})) for fact in meta["facts"])
        bad = {str(digest): str(reason) for digest, reason in meta["bad"].items()}
        whole = images.shape[0] == len(facts) and sorted([*(fact.digest for fact in facts), *bad]) == digests
        whole &= _with_facts(_checksum(images[:]), meta["facts"], bad) == meta["crc32"]
        whole &= made or not _PASSING & set(bad.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        return None
    return Entry(images=images, facts=facts, bad=bad) if whole else None


def _checksum(images: NDArray[np.uint8]) -> int:
    crc = 0
    for start in range(0, len(images), _BATCH):
        crc = zlib.crc32(np.ascontiguousarray(images[start : start + _BATCH]).data, crc)
    return crc


def _with_facts(crc: int, facts: Sequence[Mapping[str, Any]], bad: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps([facts, bad]).encode(), crc)


def _write(cache: Path, key: str, files: Sequence[tuple[str, Path]], size: tuple[int, int], limit: int) -> None:
    facts: list[Fact] = []
    bad: dict[str, str] = {}
    crc = 0
    shape = (len(files), *size, 3)
    with tempfile.NamedTemporaryFile(dir=cache, prefix=".", suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            _header(file, shape)
            for digest, result in _decode_all(files, size, limit):
                if isinstance(result, str):
                    bad[digest] = result
                    continue
                fact, pixels = result
                facts.append(fact)
                crc = zlib.crc32(pixels, crc)
                file.write(pixels)
            # NumPy leaves room in the header for the first axis to change: bad files take no row.
            file.seek(0)
            _header(file, (len(facts), *size, 3))
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(cache / f"{key}.npy")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    said = [asdict(fact) for fact in facts]
    meta = {"facts": said, "bad": bad, "crc32": _with_facts(crc, said, bad)}
    write_atomically(cache / f"{key}.json", json.dumps(meta))


def _header(file: Any, shape: tuple[int, ...]) -> None:
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)


def _decode_all(
    files: Sequence[tuple[str, Path]], size: tuple[int, int], limit: int
) -> Iterator[tuple[str, str | tuple[Fact, bytes]]]:
    """Decode in order; a batch at a time, so that memory stays bounded."""
    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, len(files), _BATCH):
            batch = files[start : start + _BATCH]
            results = pool.map(lambda item: _one(item[0], item[1], size, limit), batch)
            yield from zip((digest for digest, _ in batch), results, strict=True)


def _one(digest: str, path: Path, size: tuple[int, int], limit: int) -> str | tuple[Fact, bytes]:
    try:
        data = read_picture(path, max_pixels=limit)
    except BadImageError as error:
        return str(error)
    if hashlib.sha256(data).hexdigest() != digest:
        return CHANGED
    try:
        picture = decode(data, size, max_pixels=limit)
    except BadImageError as error:
        return str(error)
    values = picture.histogram / picture.histogram[0].sum()
    levels = np.arange(256) / 255.0
    mean, square = values @ levels, values @ levels**2
    fact = Fact(
        digest=digest,
        format=picture.format,
        width=picture.width,
        height=picture.height,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        square=(float(square[0]), float(square[1]), float(square[2])),
        notes=notes(data) if is_dicom(data) else (),
    )
    return fact, picture.pixels.tobytes()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either the old or the new contents; mode 0600."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

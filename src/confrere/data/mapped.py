"""Arrays on disk that are mapped into memory only while they are read: thousands of sites hold no file open.

A file of the cache can end in a seal, the CRC-32 of all bytes before it, which NumPy does not read. It finds what disks
and crashes do: every change of up to 32 bits in a row, and of others all but one in 4e9. Who may write into the cache
can write a seal, too, as he could a longer hash.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from confrere import intake
from confrere.errors import DataError

_SEAL, _PIECE = 4, 1 << 22  # bytes
Blank = Callable[[tuple[int, ...], Any], np.memmap[Any, Any]]
"""Gives an array of a shape and a type to write into."""


@contextmanager
def one_maker(cache: Path) -> Iterator[None]:
    """Let one process at a time add to the folder ``cache``: others wait, then find what they wanted.

    Raises:
        OSError: the folder cannot be made or written.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(cache / ".lock", mode=0o600):
        yield


def seal(path: Path) -> None:
    """Append to a file the CRC-32 of its bytes, and flush it to disk; OSError when it cannot be written."""
    with path.open("r+b") as file:
        crc = _crc(file, os.fstat(file.fileno()).st_size)
        file.seek(0, os.SEEK_END)
        file.write(crc.to_bytes(_SEAL, "little"))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def sealed(path: Path) -> Iterator[str]:
    """Yield the name of a file to write beside ``path``; it is sealed and takes that place when all went well.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
    os.close(handle)
    try:
        yield name
        seal(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def is_sealed(path: Path) -> bool:
    """Return whether a file ends in the CRC-32 of all bytes before; OSError when it cannot be read."""
    with intake.open_file(path) as file:
        size = os.fstat(file.fileno()).st_size - _SEAL
        return size > 0 and _crc(file, size) == int.from_bytes(file.read(_SEAL), "little")


def _crc(file: BufferedIOBase, size: int) -> int:
    crc = 0
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        crc, size = zlib.crc32(piece, crc), size - len(piece)
    return crc


class Mapped:
    """The array of a ``.npy`` file.

    Attributes:
        path: of the file, which must stay where it is. shape, dtype: of the array.

    Raises:
        OSError, ValueError: there is no such file, or it holds no whole array.
    """

    def __init__(self, path: Path) -> None:
        kept = _open(path)
        self.path, self.shape, self.dtype = path, kept.shape, kept.dtype

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        """Return the rows that an index or integer array selects.

        Raises:
            DataError: the file is gone.
        """
        try:
            kept = _open(self.path)
            if kept.shape != self.shape:
                raise ValueError("another array")
        except (OSError, ValueError) as error:
            raise DataError(
                "a file of the cache was removed or changed while it was in use",
                where=str(self.path.parent),
                fix="leave the cache alone while a run goes on; `confrere resume` makes it anew",
                code="cache",
            ) from error
        found: NDArray[Any] = kept[rows]
        return found


def open_sealed(path: Path, rows: int) -> Mapped | None:
    """Return a whole array of the cache, None when it is absent, cut short or changed (it is then written anew)."""
    try:
        if not is_sealed(path):
            return None
        kept = Mapped(path)
    except (OSError, ValueError, EOFError):
        return None
    return kept if len(kept) == rows else None


def made(
    path: Path,
    rows: int,
    fill: Callable[[Blank], np.memmap[Any, Any]],
    what: str,
    whole: Callable[[], bool] = lambda: True,
) -> Mapped:
    """Return an array of the cache, filled by one process if it is not there.

    Args:
        path: of the file; its folder is the cache.
        rows: of the array.
        fill: asks for the array, writes into it and returns it.
        what: it holds, for the message.
        whole: whether what belongs beside it is there, too; else it is made anew.

    Raises:
        DataError: it cannot be written.
    """
    kept = open_sealed(path, rows)
    if kept is not None and whole():
        return kept
    try:
        with one_maker(path.parent):
            kept = open_sealed(path, rows)  # another process may have made it meanwhile
            if kept is not None and whole():
                return kept
            with sealed(path) as name:
                fill(lambda shape, kind: np.lib.format.open_memmap(name, mode="w+", dtype=kind, shape=shape)).flush()
            return Mapped(path)
    except OSError as error:
        raise DataError(
            f"cannot write the cache of {what}: {error.strerror}",
            where=str(path.parent),
            fix="free space there, or set CONFRERE_CACHE to another directory",
            code="cache",
        ) from error


def _open(path: Path) -> NDArray[Any]:
    """Return the array of a file, mapped; one of Python objects is refused, as they would have to be unpickled.

    Raises:
        OSError, ValueError: no such file, or no whole array.
    """
    try:
        kept: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (EOFError, TypeError, SyntaxError, TokenError, MemoryError, OverflowError, RecursionError) as error:
        raise ValueError("the header of the array is damaged") from error  # all of these NumPy may let through
    return kept

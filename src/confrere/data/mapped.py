"""Arrays on disk that are mapped into memory only while they are read: thousands of sites hold no file open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from confrere.errors import DataError


@contextmanager
def one_maker(cache: Path) -> Iterator[None]:
    """Let one process at a time add to the folder ``cache``: others wait, then find what they wanted.

    Raises:
        OSError: the folder cannot be made or written.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(cache / ".lock", mode=0o600):
        yield


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

"""Some rows of an array on disk, changed as they are read: a simulated shift needs no second copy of the pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.data.mapped import Mapped

Change = Callable[[NDArray[Any], NDArray[np.int64]], NDArray[Any]]


class View:
    """Rows of another array.

    Attributes:
        shape, dtype: of the rows.

    Args:
        base: (M, H, W, 3).
        rows: (N,) which of them, in this order.
        change: called with images and their numbers 0..N-1; returns as many of the same shape and type.
    """

    def __init__(self, base: Mapped | View, rows: NDArray[np.int64], change: Change | None = None) -> None:
        self._base, self._rows, self._change = base, rows, change
        self.shape: tuple[int, ...] = (len(rows), *base.shape[1:])
        self.dtype: np.dtype[Any] = base.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        """Return the rows that an index, a slice or an integer array selects."""
        chosen = np.arange(len(self))[rows]
        numbers = np.atleast_1d(chosen)
        found = self._base[self._rows[numbers]]
        if self._change is not None:
            found = self._change(found, numbers)
        return found if chosen.ndim else found[0]

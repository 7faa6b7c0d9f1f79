"""Changes as integers whose weighted sum never wraps in Z_2^32.

Site k sends ``q_k = round(w_k d_k / step)`` for its change d_k = sent - received, with a step for each tensor. Where
every ``|d_k| <= 2^e``, and ``2^L`` is at least W, the sum of all weights, ``step = 2^(e + L - 30)`` gives
``|sum_k q_k| <= 2^30 + n / 2``: n sites never wrap. A site of weight w has ``w / 2^L`` of the 2^30 levels on either
side of zero. The mean change ``step sum_k q_k / W`` is wrong by at most ``n 2^(e - 30)``. Rounding is to the nearest:
it draws nothing. Steps are powers of two: multiplying by them loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from confrere.errors import UpdateRefusedError
from confrere.federation.secure.masks import Words

Vector = NDArray[np.float64]
_NOTHING = np.zeros(0)
LEVELS = 30
"""Bits of the sum's size; one is for the sign and one for rounding."""
LEAST, MOST = -126, 31
"""Bounds of an exponent: of float32's smallest, and of twice the largest value that any check lets through."""


def exponents(change: Vector, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return for each tensor the least e with all ``|change| < 2^e``; ``sizes`` are their numbers of values.

    Raises:
        UpdateRefusedError: a value is not finite, or too large.
    """
    found = []
    for part in _parts(change, sizes):
        most = float(np.abs(part).max())
        if not most < 2.0**MOST:  # true for NaN
            what = f"a value is not finite, or its size is above 2^{MOST}"
            raise UpdateRefusedError(what, fix="lower train.lr at the site", code="update-values")
        found.append(max(LEAST, math.frexp(most)[1]))
    return tuple(found)


def to_ring(change: Vector, sizes: Sequence[int], limits: Sequence[int], weight: float, total: float) -> Words:
    """Return ``round(weight change / step)`` modulo 2^32, as many words as values.

    Args:
        change: sent minus received (d,), all tensors one after another.
        sizes: their numbers of values.
        limits: the exponent of each tensor on which all sites agreed, none below the site's own.
        weight: of this site.
        total: weight of all sites whose changes may come into the sum.
    """
    parts = zip(_parts(change, sizes), steps(limits, total), strict=True)
    scaled = np.concatenate([_NOTHING, *(np.rint(np.ldexp(weight * part, -step)) for part, step in parts)])
    return scaled.astype(np.int64).astype(np.uint32)


def from_ring(
    summed: Words, sizes: Sequence[int], limits: Sequence[int], weight: float, total: float, sites: int
) -> Vector:
    """Return the weighted mean change of ``sites`` sites with the weights' sum ``weight``, from their sum in the ring.

    Raises:
        UpdateRefusedError: a number is larger than these sites can have sent: some mask is still in it.
    """
    signed = summed.astype(np.int32).astype(np.float64)
    if float(np.abs(signed).max(initial=0.0)) > weight * math.ldexp(1.0, LEVELS - _bits(total)) + sites / 2:
        what, fix = "the sum is larger than its parts can be", "find out what changed a message on its way"
        raise UpdateRefusedError(what, fix=fix, code="secure-range")
    parts = zip(_parts(signed, sizes), steps(limits, total), strict=True)
    return np.concatenate([_NOTHING, *(np.ldexp(part, step) / weight for part, step in parts)])


def steps(limits: Sequence[int], total: float) -> list[int]:
    """Return the exponent of the step of each tensor."""
    return [limit + _bits(total) - LEVELS for limit in limits]


def shortened(change: Vector, longest: float) -> Vector:
    """Return ``change`` no longer than ``longest`` (L2, all tensors together); 0 leaves it as it is."""
    length = float(np.linalg.norm(change))
    return change * (longest / length) if 0 < longest < length else change


def _bits(total: float) -> int:
    """Return the least L with ``total <= 2^L``."""
    mantissa, exponent = math.frexp(total)
    return exponent - (mantissa == 0.5)


def _parts(vector: Vector, sizes: Sequence[int]) -> list[Vector]:
    return np.split(vector, np.cumsum(sizes)[:-1]) if sizes else []  # some rounds send nothing

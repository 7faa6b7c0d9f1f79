"""Where the randomness of a private mechanism comes from: the operating system, or, in simulations, a seed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from confrere.seeds import numpy_generator, torch_generator


def normal(shape: Sequence[int], seeded: torch.Generator | None = None) -> Tensor:
    """Return standard normal numbers in float64, by default from the operating system's entropy."""
    if seeded is not None:
        return torch.randn(shape, dtype=torch.float64, generator=seeded)
    count = math.prod(shape)
    bits = torch.frombuffer(bytearray(os.urandom(8 * count + 8)), dtype=torch.int64)[:count]
    uniform = ((bits >> 11).double() + 0.5) * 2.0**-52  # in (-1, 1), symmetric
    return (math.sqrt(2.0) * torch.erfinv(uniform)).reshape(tuple(shape))


class Source:
    """Who is drawn in one step, and its noise: with a seed those of an address, without one those of the system.

    Who is drawn has to be as secret as the noise: an attacker who knows it gets no amplification by sampling.
    """

    def __init__(self, seed: int, *address: str | int) -> None:
        self._noise = torch_generator(seed, "noise", *address) if seed else None
        self._draws = numpy_generator(seed, "draw", *address) if seed else None

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, float64."""
        return normal(shape, self._noise)

    def uniform(self, count: int) -> np.ndarray:
        """Return numbers in [0, 1), float64 (count,)."""
        if self._draws is not None:
            return self._draws.random(count)
        bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        return (bits >> np.uint64(11)) * 2.0**-53

"""Every random choice has an address: ``derive(seed, *path)``.

No generator lives longer than the choice it serves and no global generator is touched, so nothing about
randomness needs saving: a resumed run draws what an undisturbed one draws.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *path: str | int) -> int:
    """Return the 63-bit seed of one random choice.

    Args:
        seed: the run's seed.
        path: purpose, round, site: what the choice is for, e.g. ``("batches", 3, "rosendahl")``.

    >>> derive(0, "batches", 1, "a") == derive(0, "batches", 1, "a")
    True
    >>> derive(0, "batches", 1, "a") == derive(0, "batches", 1, "b")
    False
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def numpy_generator(seed: int, *path: str | int) -> np.random.Generator:
    """Return a fresh NumPy generator for the choice at ``path``."""
    return np.random.default_rng(derive(seed, *path))


def torch_generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a fresh CPU torch generator for the choice at ``path``."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *path))

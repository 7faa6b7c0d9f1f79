"""Hospitals with discs to find, and their masks: synthetic. Which methods a fast test tries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from confrere.seeds import numpy_generator

CLASSES = ("background", "disc")


def make_masks(root: Path, images: int = 24, size: tuple[int, int] = (40, 48)) -> Path:
    """Write ``<site>/images`` and ``<site>/masks``: a bright disc on noise, two images a patient."""
    for k, site in enumerate(("north", "south", "west")):
        rng = numpy_generator(0, "discs", site)
        for part in ("images", "masks"):
            (root / site / part).mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 100, (*size, 3)).astype(np.uint8)
            y, x, radius = rng.integers(12, 28), rng.integers(14, 34), rng.integers(6, 11)
            rows, columns = np.mgrid[: size[0], : size[1]]
            disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            pixels[disc, k] += 120
            name = f"p{site}{i // 2}__{i}.png"
            Image.fromarray(pixels).save(root / site / "images" / name)
            Image.fromarray(disc).save(root / site / "masks" / name)
    return root


def some_fast(names: list[str], fast: tuple[str, ...]) -> list[object]:
    """Return all names for a test's parameters, those that are not in ``fast`` marked as slow."""
    assert set(fast) <= set(names)
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]

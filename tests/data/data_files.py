from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from confrere.data.federation import Federation, load_federation
from confrere.data.options import DataOptions


def picture(seed: int = 0, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed), **options))
    return path


def make_folder(root: Path, sites: tuple[str, ...] = ("a", "b"), patients: int = 6, views: int = 2) -> Path:
    """Two classes a site, ``patients`` a class, ``views`` pictures each."""
    seed = 0
    for site in sites:
        for label in ("bad", "good"):
            for patient in range(patients):
                for view in range(views):
                    seed += 1
                    write(root / site / label / f"{site}{label}{patient}__{view}.png", seed)
    return root


def load(path: Path, cache: Path, **options: object) -> Federation:
    return load_federation(path, options=DataOptions(**options), image_size=(16, 16), seed=0, cache=cache)

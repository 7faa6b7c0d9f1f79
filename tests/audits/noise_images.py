"""Images of noise with labels drawn by lot: whatever a model gets right of them it knows by heart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise_images(folder: Path, each: int) -> Path:
    """Write two sites of ``each`` images, one a patient; return ``folder``."""
    rng = np.random.default_rng(0)
    for site in ("north", "south"):
        for number in range(each):
            file = folder / site / str(rng.choice(["one", "two"])) / f"{site}{number}__1.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
    return folder

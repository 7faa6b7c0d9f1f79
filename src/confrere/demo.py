"""The offline demonstration: generated microscopy of four sites, real pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from confrere.data.synthetic import make_microscopy

DEMO: dict[str, Any] = {
    "rounds": 6,
    "backbone": {"name": "dinov2-small-imgfocus", "depth": 8, "image_size": 70},
    "train": {"steps": 6, "batch_size": 16},
}
SEED = 2026
IMAGES = (100, 280)  # of the smallest and the largest hospital


def make_demo_data(folder: Path) -> Path:
    """Write the demonstration's images to ``folder`` unless they are there, and return it."""
    if not folder.exists():
        make_microscopy(folder, seed=SEED, images=IMAGES)
    return folder

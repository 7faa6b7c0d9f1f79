"""Boxes around the lesions of HAM10000 at its four real sites: methods beside training alone and pooled training.

    python recipes/lesion_boxes.py DATA --out results/lesion-boxes

DATA and the drawing of lesions are those of ``lesion_masks.py``; a box goes around each connected part of a mask,
almost always one an image. Three seeds. Splits are by lesion; rounds are chosen by validation images; test images are
examined once at the end of each run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lesion_masks import carry_out

METHODS = ("fedopal", "fedit", "local", "pooled")
SETTINGS: dict[str, Any] = {
    "task": "detection",
    "threads": 1,
    "controls": [],
    "data": {"classes": ["background", "lesion"], "image_size": [140, 140]},
    "backbone": {"name": "dinov2-small-imgfocus", "depth": 8},
    "adapter": {"blocks": 1},
    "train": {"batch_size": 4, "lr": 3e-3, "steps": 10, "views": 2},
    "rounds": 4,
    "selection": {"every": 4},
}


def main() -> None:
    carry_out(__doc__, SETTINGS, METHODS, Path("results/lesion-boxes"), 120)


if __name__ == "__main__":
    main()

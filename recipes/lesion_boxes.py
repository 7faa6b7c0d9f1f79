"""Boxes around the lesions of HAM10000 at its four real sites: methods beside training alone and pooled training.

    python recipes/lesion_boxes.py DATA --out results/lesion-boxes

DATA and the drawing of lesions are those of ``lesion_masks.py``; a box goes around each connected part of a mask,
almost always one an image. Three seeds. Splits are by lesion; rounds are chosen by validation images; test images are
examined once at the end of each run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from comparison_page import compared
from lesion_masks import prepare

from confrere.config import override, validate

METHODS = ("fedopal", "fedit", "local", "pooled")
SEEDS = (0, 1, 2)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/lesion-boxes"))
    parser.add_argument("--lesions", type=int, default=120)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = prepare(args.data, args.out, args.lesions)
    experiment = validate(override({**SETTINGS, "path": str(table.resolve())}, args.overrides))
    compared(experiment, args.methods, SEEDS, args.out / "compare", args.jobs)


if __name__ == "__main__":
    main()

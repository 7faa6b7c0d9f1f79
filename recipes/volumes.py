"""Hippocampus in MR volumes at four simulated sites: methods beside training alone and pooled training, three seeds.

    python recipes/volumes.py DATA --out results/volumes

DATA holds ``volumes.zip`` (Medical Segmentation Decathlon, task 4; one hospital's volumes). ``--volumes`` of them are
dealt out at random: sites differ by chance alone, so that what is seen is what more volumes are worth.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from comparison_page import compared
from hippocampus import CLASSES, unpack

from confrere.config import override, validate
from confrere.seeds import numpy_generator

METHODS = ("fedit", "fedper", "local", "pooled")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "task": "volume-segmentation",
    "method": "fedit",
    "threads": 1,
    "controls": [],
    "data": {"classes": list(CLASSES), "volume": {"size": [48, 64, 48]}, "test": 0.3},
    "backbone": {"name": "unet", "patch": [32, 32, 32]},
    "train": {"batch_size": 4, "lr": 3e-3, "steps": 12, "balance": "none"},
    "rounds": 10,
    "selection": {"every": 5},
    "record": {"keep": 1},
}


def prepare(data: Path, out: Path, volumes: int) -> Path:
    """Unpack the volumes and write the table of the drawn ones; return the CSV."""
    table = out / f"volumes-{volumes}.csv"
    names = unpack(data, out)
    if not table.exists():
        chosen = numpy_generator(0, "volumes").permutation(names)[:volumes]
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "mask", "site", "patient"])
            writer.writerows([f"images/{n}", f"labels/{n}", f"site{i % 4}", n] for i, n in enumerate(chosen))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/volumes"))
    parser.add_argument("--volumes", type=int, default=96)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    table = prepare(args.data, args.out, args.volumes)
    experiment = validate(override({**SETTINGS, "path": str(table.resolve())}, args.overrides))
    compared(experiment, args.methods, SEEDS, args.out / "compare", 1)


if __name__ == "__main__":
    main()

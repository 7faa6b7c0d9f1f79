"""Lesion masks of HAM10000 at its four real sites: methods beside training alone and pooled training, three seeds.

    python recipes/lesion_masks.py DATA --out results/lesion-masks --page docs/results/lesion-masks.md

DATA holds ``images_200x150.zip``, ``masks_200x150.zip`` and ``metadata.csv`` (image_id, lesion_id, dx, site). So many
lesions as ``--lesions`` says are drawn at each site, with one image each: enough for masks, and every site then has
few. Splits are by lesion; rounds are chosen by validation images; test images are examined once at the end of each run.
"""

from __future__ import annotations

import argparse
import csv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison_page import compared

from confrere.config import override, validate
from confrere.errors import DataError
from confrere.seeds import numpy_generator

METHODS = ("fedopal", "fedit", "fedper", "ditto", "local", "pooled")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "task": "segmentation",
    "threads": 1,
    "controls": [],
    "data": {"classes": ["background", "lesion"], "image_size": [140, 140]},
    "backbone": {"name": "dinov2-small-imgfocus", "depth": 8},
    "adapter": {"blocks": 2},
    "train": {"batch_size": 8, "lr": 1e-3, "steps": 10, "views": 2},
    "rounds": 8,
    "selection": {"every": 2},
}


def listed(data: Path, *archives: str) -> list[dict[str, str]]:
    """Return the rows of metadata.csv by image; DataError if it or one of the archives is missing."""
    for name in (*archives, "metadata.csv"):
        if not (data / name).exists():
            raise DataError(f"{name} is missing", where=str(data), fix="give the folder of the HAM10000 copy")
    with (data / "metadata.csv").open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["image_id"])


def prepare(data: Path, out: Path, lesions: int) -> Path:
    """Unpack images and masks once and write the table of the drawn ones; return the CSV."""
    table = out / f"lesion-masks-{lesions}.csv"
    if table.exists():
        return table
    rows = listed(data, "images_200x150.zip", "masks_200x150.zip")
    chosen = [row for site in sorted({row["site"] for row in rows}) for row in drawn(rows, site, lesions)]
    for archive, folder, ending in (("images_200x150.zip", "images", ".jpg"), ("masks_200x150.zip", "masks", ".png")):
        unpack(data / archive, out / folder, {row["image_id"] for row in chosen}, ending)
    with table.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "mask", "label", "site", "lesion"])
        for row in chosen:
            name = row["image_id"]
            writer.writerow([f"images/{name}.jpg", f"masks/{name}.png", row["dx"], row["site"], row["lesion_id"]])
    table.with_suffix(".tmp").replace(table)
    return table


def drawn(rows: list[dict[str, str]], site: str, lesions: int) -> list[dict[str, str]]:
    """Return the first image of each of ``lesions`` lesions of a site, drawn by an address of their own."""
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["site"] == site:
            first.setdefault(row["lesion_id"], row)
    order = numpy_generator(0, "lesion masks", site).permutation(sorted(first))
    return [first[str(lesion)] for lesion in order[:lesions]]


def unpack(archive: Path, folder: Path, wanted: set[str], ending: str) -> None:
    """Write the members of ``archive`` whose name begins with a wanted identifier as ``<identifier><ending>``."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as source:
        for member in source.namelist():
            name = Path(member).stem.removesuffix("_segmentation")
            if name in wanted and member.endswith(ending):
                (folder / f"{name}{ending}").write_bytes(source.read(member))


def main() -> None:
    carry_out(__doc__, SETTINGS, METHODS, Path("results/lesion-masks"), 240)


def carry_out(
    description: str | None, settings: dict[str, Any], methods: Sequence[str], out: Path, lesions: int
) -> None:
    """Compare methods as the command line says, with these defaults; also what the recipe for boxes does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--lesions", type=int, default=lesions)
    parser.add_argument("--methods", default=",".join(methods))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = prepare(args.data, args.out, args.lesions)
    experiment = validate(override({**settings, "path": str(table.resolve())}, args.overrides))
    compared(experiment, args.methods, SEEDS, args.out / "compare", args.jobs)


if __name__ == "__main__":
    main()

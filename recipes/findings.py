"""Several findings an image of HAM10000 at its four real sites: methods beside training alone and pooled training.

    python recipes/findings.py DATA --out results/findings

DATA holds ``images_200x150.zip`` and ``metadata.csv``. One image each of ``--lesions`` lesions is drawn at each site, a
quarter malignant and a quarter benign and not melanocytic where there are as many. ``malignant`` (mel, bcc, akiec) is
not known where experts agreed by looking alone, ``trunk`` where nobody wrote down the place; ``melanocytic`` (mel, nv)
is always known. Three seeds. Splits are by lesion; rounds are chosen by validation images; test images are
examined once at the end of each run.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from comparison_page import compared, gain, interval
from lesion_masks import listed, unpack

from confrere.compare.table import interval as over_seeds
from confrere.config import override, validate
from confrere.record.files import read_json
from confrere.seeds import numpy_generator

METHODS = ("fedopal", "fedit", "local", "pooled")
SEEDS = (0, 1, 2)
MALIGNANT, MELANOCYTIC = ("mel", "bcc", "akiec"), ("mel", "nv")
TRUNK = ("back", "trunk", "chest", "abdomen")
FINDINGS = ("malignant", "melanocytic", "trunk")
SETTINGS: dict[str, Any] = {
    "task": "multi-label",
    "threads": 1,
    "controls": [],
    "data": {"classes": list(FINDINGS)},
    "backbone": {"name": "dinov2-small-imgfocus", "depth": 8, "image_size": 70},
    "adapter": {"blocks": 1},
    "train": {"batch_size": 16, "lr": 1e-3, "steps": 20},
    "rounds": 16,
    "selection": {"every": 4},
}


def prepare(data: Path, out: Path, lesions: int) -> Path:
    """Unpack the images of the drawn lesions and write their table; return the CSV."""
    table = out / f"findings-{lesions}.csv"
    if table.exists():
        return table
    rows = listed(data, "images_200x150.zip")
    chosen = [row for site in sorted({row["site"] for row in rows}) for row in drawn(rows, site, lesions)]
    unpack(data / "images_200x150.zip", out / "images", {row["image_id"] for row in chosen}, ".jpg")
    with table.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels", "site", "lesion"])
        for row in chosen:
            writer.writerow([f"images/{row['image_id']}.jpg", "|".join(said(row)), row["site"], row["lesion_id"]])
    table.with_suffix(".tmp").replace(table)
    return table


def drawn(rows: list[dict[str, str]], site: str, lesions: int) -> list[dict[str, str]]:
    """Return the first image of each of ``lesions`` lesions of a site, or of all it has.

    At most a quarter are malignant and at most a quarter benign and not melanocytic; the others are naevi.
    """
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["site"] == site:
            first.setdefault(row["lesion_id"], row)
    order = [first[str(name)] for name in numpy_generator(0, "findings", site).permutation(sorted(first))]
    malignant = [row for row in order if row["dx"] in MALIGNANT][: lesions // 4]
    other = [row for row in order if row["dx"] not in (*MALIGNANT, *MELANOCYTIC)][: lesions // 4]
    naevi = [row for row in order if row["dx"] == "nv"]
    return malignant + other + naevi[: lesions - len(malignant) - len(other)]


def said(row: Mapping[str, str]) -> Iterator[str]:
    """Yield the findings of an image, with ``?`` before those that nobody said."""
    if row["dx_type"] == "consensus":
        yield "?malignant"
    elif row["dx"] in MALIGNANT:
        yield "malignant"
    if row["dx"] in MELANOCYTIC:
        yield "melanocytic"
    if row["localization"] == "unknown":
        yield "?trunk"
    elif row["localization"] in TRUNK:
        yield "trunk"


def tables(found: Mapping[str, Any], out: Path) -> str:
    """Return the scores, those by site and those by finding in Markdown; every number comes from the comparison."""
    scores = ("auroc", "general", "average_precision", "f1", "brier")
    head = ["AUROC", "general model alone", "average precision", "F1", "Brier score", "against training alone, points"]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for one in found["methods"]:
        cells = [*(interval(one[score]) for score in scores), gain(one["gains"].get("local"))]
        lines.append(f"| `{one['name']}` | " + " | ".join(cells) + " |")
    places = sorted(found["methods"][0]["sites"])
    lines += ["", "| method | " + " | ".join([*FINDINGS, *places]) + " |"]
    lines += ["|---" * (len(FINDINGS) + len(places) + 1) + "|"]
    for one in found["methods"]:
        cells = [interval(over_seeds(of_finding(found, out, one["name"], finding))) for finding in FINDINGS]
        lines.append(
            f"| `{one['name']}` | " + " | ".join([*cells, *(interval(one["sites"][s]) for s in places)]) + " |"
        )
    return "\n".join(lines)


def of_finding(found: Mapping[str, Any], out: Path, method: str, finding: str) -> list[float]:
    """Return a method's AUROC of one finding in every seed, mean over the sites where it is defined."""
    values = []
    for cell in found["cells"]:
        if cell["method"] == method:
            sites = read_json(out / "cells" / cell["cell"] / "results.json")["sites"].values()
            each = [site["models"]["personalised"]["by_class"][finding]["value"] for site in sites]
            values.append(float(np.mean([value for value in each if value is not None])))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/findings"))
    parser.add_argument("--lesions", type=int, default=240, help="of each site")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = prepare(args.data, args.out, args.lesions)
    experiment = validate(override({**SETTINGS, "path": str(table.resolve())}, args.overrides))
    found = compared(experiment, args.methods, SEEDS, args.out / "compare", args.jobs)
    print(tables(found, args.out / "compare"))


if __name__ == "__main__":
    main()

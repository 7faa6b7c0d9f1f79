"""Survival after breast cancer in six regions of TCGA-BRCA: methods beside training alone and pooled training.

    python recipes/tcga_brca.py DATA --out results/tcga-brca
    python recipes/tcga_brca.py DATA --out results/tcga-brca-cox --methods fedit,fedadam,pooled task.curve=cox
    python recipes/tcga_brca.py DATA --out results/tcga-brca-private --private

DATA holds ``brca.csv``, ``centers.csv`` and ``train_test_split.csv`` of FLamby's Fed-TCGA-BRCA. Its split between
train and test is kept; a fifth of each region's training patients judges the rounds. Time is in years; whoever left on
the day of diagnosis (12 patients) is counted with half a day.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from comparison_page import compared

from confrere.config import override, validate
from confrere.errors import DataError
from confrere.seeds import numpy_generator

METHODS = ("fedopal", "fedit", "fedadam", "fedper", "ditto", "local", "pooled")
EQUAL = "federation.weights=equal:gate.norm=0:gate.factor=0:privacy.delta=1e-3"
PRIVATE = (f"dpfed:post=0.0:{EQUAL}", f"dpfed:{EQUAL}", f"dpfed:post=0.0:sigma=0.0:{EQUAL}")
"""Plain DPFed and DPFed-post with noise of twice the clip, and the clip alone."""
SEEDS = (0, 1, 2)
YEAR = 365.25
SETTINGS: dict[str, Any] = {
    "task": {"name": "survival", "horizon": 10.0, "bins": 10},
    "threads": 1,
    "controls": [],
    "backbone": {"name": "mlp"},
    "adapter": {"rank": 8, "blocks": 2},
    "train": {"batch_size": 32, "lr": 2e-3, "steps": 10, "balance": "none"},
    "rounds": 20,
}


def prepare(data: Path, out: Path) -> Path:
    """Write the table of patients with their region; return the CSV."""
    table = out / "tcga-brca.csv"
    if table.exists():
        return table
    for name in ("brca.csv", "centers.csv", "train_test_split.csv"):
        if not (data / name).exists():
            raise DataError(f"{name} is missing", where=str(data), fix="give the folder of Fed-TCGA-BRCA")
    regions = {row["TSS Code"]: row["Region"] for row in rows(data / "centers.csv")}
    parts = {row["pid"]: row["fold"] for row in rows(data / "train_test_split.csv")}
    patients = [row for row in rows(data / "brca.csv") if row["pid"] in parts]
    features = [name for name in patients[0] if name not in ("pid", "E", "T")]
    out.mkdir(parents=True, exist_ok=True)
    with table.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "patient", "split", "time", "event", *features])
        for row in sorted(patients, key=lambda row: row["pid"]):
            split = parts[row["pid"]]
            judges = split == "train" and numpy_generator(0, "tcga", row["pid"]).random() < 0.2
            time = max(float(row["T"]), 0.5) / YEAR
            told = [regions[row["pid"][5:7]], row["pid"], "val" if judges else split, time, int(float(row["E"]))]
            writer.writerow([*told, *(row[name] for name in features)])
    table.with_suffix(".tmp").replace(table)
    return table


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/tcga-brca"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--private", action="store_true", help="the methods with noise instead")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    table = prepare(args.data, args.out)
    experiment = validate(override({**SETTINGS, "path": str(table.resolve())}, args.overrides))
    methods = ",".join(PRIVATE) if args.private else args.methods
    compared(experiment, methods, SEEDS, args.out / "compare", args.jobs)


if __name__ == "__main__":
    main()

"""HAM10000 at its four real sites: every method of the first release and its controls, three seeds.

    python recipes/ham10000.py DATA --out results/ham10000 --jobs 2 --page docs/results/ham10000.md

DATA holds ``images_200x150.zip`` (or a folder of ``*.jpg``) and ``metadata.csv`` with the columns image_id,
lesion_id, dx and site. Splits are by lesion; rounds are chosen by validation data; test images are examined once
at the end of each run. A comparison that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import csv
import zipfile
from pathlib import Path
from typing import Any

import torch

from confrere.compare import compare
from confrere.config import validate
from confrere.errors import DataError
from confrere.progress import progress
from confrere.report import write_report

METHODS = ("fedopal", "fedopal:head=local", "dual", "fedit-ft", "fedit", "local", "pooled")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "rounds": 10,
    "threads": 1,
    "controls": [],
    "backbone": {"name": "dinov2-small-imgfocus", "depth": 8, "image_size": 70},
    "train": {"steps": 10, "batch_size": 16, "lr": 3e-3},
    "selection": {"every": 2},
}


def prepare(data: Path, out: Path) -> Path:
    """Unpack the pictures once and write the table; return the CSV."""
    table = out / "ham10000.csv"
    if table.exists():
        return table
    if not (data / "metadata.csv").exists():
        raise DataError("metadata.csv is missing", where=str(data), fix="give the folder of the HAM10000 copy")
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    archive = data / "images_200x150.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as pictures:
            for member in pictures.namelist():
                if member.endswith(".jpg"):
                    (images / Path(member).name).write_bytes(pictures.read(member))
    else:
        for picture in data.rglob("*.jpg"):
            (images / picture.name).write_bytes(picture.read_bytes())
    draft = table.with_suffix(".tmp")
    with (data / "metadata.csv").open(newline="") as source, draft.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["path", "label", "site", "lesion"])
        for row in csv.DictReader(source):
            writer.writerow([f"images/{row['image_id']}.jpg", row["dx"], row["site"], row["lesion_id"]])
    draft.replace(table)
    return table


def interval(value: dict[str, Any] | None, prefix: str = "") -> str:
    """Return ``0.612 (0.590 to 0.634)``."""
    key = prefix or "mean"
    if value is None or value[key] is None:
        return "-"
    low, high = (value[f"{prefix}_{side}" if prefix else side] for side in ("low", "high"))
    return f"{value[key]:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None else "")


def page(found: dict[str, Any], command: str) -> str:
    """Return the results page in Markdown; every number comes from comparison.json."""
    machine = found["machine"]
    lines = [
        "# HAM10000, four real sites",
        "",
        f"Command: `{command}`. Date {found['date']}; {machine['cores']} cores ({machine['cpu_capability']}), "
        f"one thread a run, torch {machine['torch']}, confrere {machine['confrere']}. "
        f"Seeds {', '.join(map(str, found['seeds']))}; one split by lesion for all. "
        "Mean over sites of the balanced accuracy of each site's own test images, then mean and 95 % Student t "
        "interval over seeds.",
        "",
        "| method | balanced accuracy | worst site | AUROC | macro F1 | ECE | general model alone | "
        "overlap B | overlap A | kB a round, all sites |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in found["methods"]:
        overlap = m["overlap_after"] or {}
        cells = [
            f"{m['title']} (`{m['name']}`)",
            interval(m["balanced_accuracy"]),
            interval(m["balanced_accuracy"], "worst"),
            interval(m["auroc"]),
            interval(m["f1"]),
            interval(m["ece"]),
            interval(m["general"]),
            *(f"{overlap[k]:.3f}" if k in overlap else "-" for k in ("B", "A")),
            f"{m['bytes_per_round'] / 1000:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    sites = sorted(found["methods"][0]["sites"])
    lines += [
        "",
        "Balanced accuracy by site:",
        "",
        "| method | " + " | ".join(sites) + " |",
        "|---" * (len(sites) + 1) + "|",
    ]
    lines += [
        f"| `{m['name']}` | " + " | ".join(interval(m["sites"][s]) for s in sites) + " |" for m in found["methods"]
    ]
    lines += [
        "",
        "Paired tests of the first method against each other one (same test lesions, bootstrap over seeds and "
        "lesions, Holm-adjusted p):",
        "",
    ]
    for pair in found["pairs"]:
        p = "-" if pair["p_holm"] is None else f"{pair['p_holm']:.3f}"
        lines.append(f"- {pair['sentence']} (adjusted p {p})")
    return "\n".join([*lines, "", "The experiment:", "", "```toml", without_path(found["experiment"]), "```", ""])


def without_path(experiment: str) -> str:
    """Return the experiment without where the data lay."""
    return "\n".join(line for line in experiment.splitlines() if not line.startswith("path = "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/ham10000"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = prepare(args.data, args.out / "data")
    experiment = validate({**SETTINGS, "path": str(table.resolve())})
    with progress(quiet=False) as notify:
        names = args.methods.split(",")
        found = compare(experiment, names, SEEDS, args.out / "runs", jobs=args.jobs, notify=notify)
    print(write_report(args.out / "runs"))
    if args.page:
        args.page.write_text(page(found, "make ham10000 DATA=/path/to/fed_ham10000"))


if __name__ == "__main__":
    main()

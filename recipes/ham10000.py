"""HAM10000 at its four real sites: methods, their controls and variants, three seeds.

    python recipes/ham10000.py DATA --out results/ham10000 --jobs 2 --page docs/results/ham10000.md

DATA holds ``images_200x150.zip`` (or a folder of ``*.jpg``) and ``metadata.csv`` with the columns image_id,
lesion_id, dx and site. Splits are by lesion; rounds are chosen by validation data; test images are examined once
at the end of each run. A comparison that was stopped continues where it was.

Comparisons: ``methods`` sets FedOPAL beside its controls; ``variants`` sets FedOPAL's own choices side by side
in shorter runs on smaller images; ``zoo`` compares every registered method, and tunes them all equally with ``--tune``,
in runs that two cores finish in an hour; ``zoo-large`` is the same for a larger machine; ``concept`` and ``stain``
simulate differences between the sites; ``private`` hides every training image (docs/privacy.md) at epsilon 8, 1 and 4.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comparison_page import gain, interval

from confrere.compare import compare
from confrere.config import override, validate
from confrere.errors import DataError
from confrere.method import METHODS as REGISTRY
from confrere.progress import progress
from confrere.report import write_report

METHODS = ("fedopal", "fedopal:head=local", "dual", "fedit-ft", "fedit", "local", "pooled")
VARIANTS = (
    "fedopal",
    *(f"fedopal:regulariser={name}" for name in ("W-A1", "W-A2", "W-D", "R-cos", "R-feat")),
    *(f"fedopal:routing={name}" for name in ("personal_only", "general_only")),
    *(f"fedopal:aggregation={name}" for name in ("ffa", "svd")),
    "dual",
)
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "controls": [],
    "backbone": {"name": "dinov2-small-imgfocus", "depth": 8},
    "train": {"batch_size": 16, "lr": 1e-3},
}
ZOO = ("fedopal", *sorted(set(REGISTRY) - {"fedopal"}))
SMALL = ["rounds=8", "train.steps=12", "train.lr=2e-3", "selection.every=2", "selection.images=200"]
SMALL += ["backbone.image_size=70", "adapter.blocks=2", "engine.precision=bf16", "threads=1", "workers=2"]
SHIFTED = (
    "fedopal",
    "fedit",
    "fedper",
    "fedbn",
    "fedsa-lora",
    "ditto",
    "feddpa-t",
    "fedacs",
    "ifca",
    "fedalt",
    "local",
    "pooled",
)
CONCEPT = 'data.shift=[{kind="concept", sites=["vidir_modern"], classes=["bkl", "mel"]}]'
STAIN = 'data.shift=[{kind="stain", strength=0.8}]'
RECORD = "privacy.unit=record:privacy.delta=1e-5:privacy.epsilon="
QUIET = "adapter.scale=0.02:train.lr=5e-2"
"""Of the heads and adapters that noisy steps train: what noise makes of an adapter hardly counts, see the page."""
LARGE = f"{QUIET}:train.batch_size=256"
PRIVATE = (
    *(f"fedit:{LARGE}:{RECORD}{epsilon}" for epsilon in (8, 4, 1)),
    f"fedit:{LARGE}:privacy.centred=false:{RECORD}8",
    f"fedit:{LARGE}",
    "fedit",
    "local",
)
FEW = [
    "rounds=10",
    "train.steps=10",
    "train.batch_size=128",
    "train.lr=2e-3",
    "train.balance=none",
    "selection.every=10",
]
FEW += ["adapter.rank=4", "adapter.blocks=1", "backbone.image_size=70", "engine.precision=fp32"]
COMPARISONS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "methods": (METHODS, ["rounds=16", "train.steps=20", "selection.every=4", "backbone.image_size=98"]),
    "variants": (VARIANTS, ["rounds=12", "train.steps=10", "selection.every=4", "backbone.image_size=70"]),
    "zoo": (ZOO, SMALL),
    "zoo-large": (ZOO, ["rounds=30", "train.steps=20", "selection.every=3", "backbone.image_size=98"]),
    "concept": (SHIFTED, [*SMALL, CONCEPT]),
    "stain": (SHIFTED, [*SMALL, STAIN]),
    "private": (PRIVATE, FEW),
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


def scores(found: dict[str, Any]) -> list[str]:
    """Return the table of one comparison; every number comes from comparison.json."""
    lines = [
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
    return lines


def by_site(found: dict[str, Any]) -> list[str]:
    """Return the balanced accuracy of every method at every site."""
    sites = sorted(found["methods"][0]["sites"])
    lines = ["| method | " + " | ".join(sites) + " |", "|---" * (len(sites) + 1) + "|"]
    for m in found["methods"]:
        lines.append(f"| `{m['name']}` | " + " | ".join(interval(m["sites"][s]) for s in sites) + " |")
    return lines


def paired(found: dict[str, Any]) -> list[str]:
    """Return the gains of the first method over each other one, in points, with interval and adjusted p."""
    sites = sorted(found["methods"][0]["sites"])
    lines = ["| compared with | " + " | ".join(sites) + " |", "|---" * (len(sites) + 1) + "|"]
    for m in found["methods"][1:]:
        of = {p["site"]: p for p in found["pairs"] if p["b"] == m["name"]}
        lines.append(f"| `{m['name']}` | " + " | ".join(gain(of.get(s)) for s in sites) + " |")
    return lines


def page(found: dict[str, dict[str, Any]], command: str) -> str:
    """Return the results page in Markdown."""
    first = next(iter(found.values()))
    machine = first["machine"]
    lines = [
        "# HAM10000, four real sites",
        "",
        f"Command: `{command}`. Date {first['date']}; {machine['cores']} cores ({machine['cpu_capability']}), "
        f"one thread a run, torch {machine['torch']}, confrere {machine['confrere']}. "
        f"Seeds {', '.join(map(str, first['seeds']))}; one split by lesion for all. "
        "Mean over sites of the balanced accuracy of each site's own test images, then mean and 95 % Student t "
        "interval over seeds.",
    ]
    for name, one in found.items():
        settings = ", ".join(f"`{choice}`" for choice in COMPARISONS[name][1])
        lines += ["", f"## {name.capitalize()}", "", f"With {settings}.", "", *scores(one)]
        lines += ["", "Balanced accuracy by site:", "", *by_site(one), ""]
        lines += [
            f"Gain of `{one['methods'][0]['name']}` over each other row in points of balanced accuracy (same test "
            "lesions, bootstrap over seeds and lesions, 95 % interval, Holm-adjusted p):",
            "",
            *paired(one),
        ]
    experiment = without_path(first["experiment"])
    return "\n".join([*lines, "", "## The experiment", "", "```toml", experiment, "```", ""])


def one_lesion_in(
    share: int,
    table: Path,
    out: Path,
    *,
    which: int = 0,
    label: Callable[[str], str] = str,
    most: int = 0,
) -> Path:
    """Write the rows of one lesion in ``share``, by a hash of its name, with other labels; return the CSV.

    Paths still hold where it lies beside ``table``. Of another ``which``, 0 to share - 1, no lesion is the same. Of
    each lesion there are the first ``most`` images; 0: all.
    """
    if not out.exists():
        draft = out.with_suffix(".tmp")
        with table.open(newline="") as source, draft.open("w", newline="") as target:
            reader = csv.DictReader(source)
            writer = csv.DictWriter(target, reader.fieldnames or [])
            writer.writeheader()
            seen: Counter[str] = Counter()
            for row in reader:
                seen[row["lesion"]] += 1
                drawn = hashlib.sha256(row["lesion"].encode()).digest()[0] % share == which
                if drawn and (not most or seen[row["lesion"]] <= most):
                    writer.writerow({**row, "label": label(row["label"])})
        draft.replace(out)
    return out


def without_path(experiment: str) -> str:
    """Return the experiment without where the data lay."""
    return "\n".join(line for line in experiment.splitlines() if not line.startswith("path = "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/ham10000"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=list(COMPARISONS), action="append", help="default: methods and variants")
    parser.add_argument("--tune", type=int, default=0, help="trials of tuning, for every method")
    parser.add_argument("--methods", help="a,b:key=value instead of those of the comparison")
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value, e.g. engine.precision=fp32")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    table = prepare(args.data, args.out / "data")
    found = {}
    for name in args.only or ("methods", "variants"):
        methods, settings = COMPARISONS[name]
        methods = tuple(args.methods.split(",")) if args.methods else methods
        experiment = validate(override({**SETTINGS, "path": str(table.resolve())}, [*settings, *args.overrides]))
        with progress(quiet=False) as notify:
            options = {"jobs": args.jobs, "trials": args.tune, "controls": False, "notify": notify}
            found[name] = compare(experiment, methods, SEEDS, args.out / name, **options)
        print(write_report(args.out / name))
    if args.page:
        some = "".join(f" --only {name}" for name in args.only or ())
        whole = f"python recipes/ham10000.py /path/to/fed_ham10000{some}"
        args.page.write_text(page(found, whole if some else "make ham10000 DATA=/path/to/fed_ham10000"))


if __name__ == "__main__":
    main()

"""Federated pre-training on HAM10000 without labels, then what the backbones are worth with labels; three seeds.

    python recipes/pretraining.py DATA --out results/pretraining

DATA holds ``images_200x150.zip``, ``masks_200x150.zip`` and ``metadata.csv`` (image_id, lesion_id, dx, site). Training
images are dealt out to ``--clients`` clients by lesion: ``homogeneous``, at random; ``heterogeneous``, each class in
shares of a Dirichlet distribution (0.3). Lesions for validation and test are the same everywhere, and no pre-training
sees the latter. Each backbone then stays frozen: a ridge head, solved in one round of the four real sites, and masks.
Whatever is finished is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lesion_masks import listed, unpack

from confrere.adapters.lora import LoraSpec
from confrere.backbones import load
from confrere.compare.table import interval
from confrere.config import override, validate
from confrere.export import export_backbone
from confrere.job import run_experiment
from confrere.method import make
from confrere.pretrain import GENERAL, pretraining
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks import make_task

SEEDS = (0, 1, 2)
SPLITS = ("homogeneous", "heterogeneous")
ARMS = ("random", "one client", "fedit", "fedavgm", "fedadagrad", "fedadam", "pooled, steps of one", "pooled")
SIDE, SKEW = 48, 0.3
PRETRAINING: dict[str, Any] = {
    "threads": 1,
    "controls": [],
    "data": {"image_size": [SIDE, SIDE]},
    "train": {"lr": 1e-3, "steps": 4, "batch_size": 32, "views": 4},
    "selection": {"every": 30, "images": 128},
}
LABELLED: dict[str, Any] = {
    "threads": 1,
    "controls": [],
    "data": {"image_size": [SIDE, SIDE]},
    "method": "ridge",
    "rounds": 1,
}
MASKS: dict[str, Any] = {
    "threads": 1,
    "controls": [],
    "task": "segmentation",
    "data": {"image_size": [SIDE, SIDE], "classes": ["background", "lesion"]},
    "method": "fedit",
    "rounds": 6,
    "train": {"steps": 10, "batch_size": 16, "lr": 2e-3},
    "selection": {"every": 6, "images": 64},
}


def prepare(data: Path, out: Path, clients: int) -> dict[str, Path]:
    """Unpack the images and masks and write the tables: one a split for pre-training, ``labels`` and ``masks``."""
    of_clients = [*SPLITS, *(f"{name}-one" for name in SPLITS)]  # all clients, and the first one alone
    tables = {name: out / f"{name}-{clients}.csv" for name in of_clients}
    tables |= {name: out / f"{name}.csv" for name in ("labels", "masks")}
    if all(table.exists() for table in tables.values()):
        return tables
    rows = listed(data, "images_200x150.zip", "masks_200x150.zip")
    lesions = {row["lesion_id"]: row["dx"] for row in rows}
    part = dict(
        zip(sorted(lesions), numpy_generator(0, "split").choice(3, len(lesions), p=(0.65, 0.1, 0.25)), strict=True)
    )
    known = {row["image_id"] for row in rows}
    unpack(data / "images_200x150.zip", out / "images", known, ".jpg")
    unpack(data / "masks_200x150.zip", out / "masks", known, ".png")
    for name in SPLITS:
        client = dealt(lesions, clients, even=name == "homogeneous")
        named = [{**row, "site": f"client{client[row['lesion_id']]:02d}"} for row in rows]
        write(tables[name], named, part, ("site",))
        write(tables[f"{name}-one"], [row for row in named if row["site"] == "client00"], part, ("site",))
    labelled = [{**row, "label": row["dx"], "mask": f"masks/{row['image_id']}.png"} for row in rows]
    write(tables["labels"], labelled, part, ("site", "label"))
    few = [row for row in labelled if int(row["image_id"][-2:]) < 10]  # a tenth: masks cost more
    write(tables["masks"], few, part, ("site", "label", "mask"))
    return tables


def dealt(lesions: Mapping[str, str], clients: int, *, even: bool) -> dict[str, int]:
    """Return the client of each lesion: at random, or by shares of every class that are drawn anew."""
    rng, found = numpy_generator(0, "clients", clients, even), dict[str, int]()
    for label in sorted(set(lesions.values())):
        own = sorted(lesion for lesion, dx in lesions.items() if dx == label)
        shares = [1 / clients] * clients if even else rng.dirichlet([SKEW] * clients)
        found |= zip(own, rng.choice(clients, len(own), p=shares).tolist(), strict=True)
    return found


def write(table: Path, rows: Sequence[Mapping[str, str]], part: Mapping[str, int], columns: Sequence[str]) -> None:
    """Write a table of images with their lesion and split, and further columns of the rows."""
    with table.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "lesion", "split", *columns])
        for row in rows:
            split = ("train", "val", "test")[part[row["lesion_id"]]]
            writer.writerow([f"images/{row['image_id']}.jpg", row["lesion_id"], split, *(row[c] for c in columns)])
    table.with_suffix(".tmp").replace(table)


def pretrained(arm: str, seed: int, table: Path, out: Path, args: argparse.Namespace) -> tuple[Path, float | None]:
    """Return the backbone of an arm, trained if it is not there, and what share of hidden patches it explains."""
    task, folder = {"name": args.task}, out / f"{named(arm)}-{seed}"
    if arm == "random":
        if not (folder / "config.json").exists():
            made = load("vit-nano", lora=LoraSpec(slots=(), blocks=1), image_size=SIDE, task=make_task(task))
            export_backbone(folder, make("fedit"), made, made.start(torch_generator(seed, "init", "weights")))
        return folder, None
    method = {"one client": "local", "pooled, steps of one": "pooled"}.get(arm, arm)
    rounds = max(1, args.rounds // args.clients) if arm == "pooled, steps of one" else args.rounds
    names = {"task": task, "backbone": {"name": "vit-nano"}, "method": {"name": method}}
    values = pretraining({**PRETRAINING, **names, "rounds": rounds, "seed": seed})
    results = finished({**values, "path": str(table.resolve())}, folder, args.overrides)
    measure = next(iter(results["task"]["measures"]))
    if method == "local":
        name = min(results["sites"])
        found = results["sites"][name]["models"]["personalised"][measure]["value"]
        return folder / "adapters" / name / "backbone", found
    return folder / GENERAL, results["summary"]["personalised"]["mean"]


def named(arm: str) -> str:
    """Return an arm as the name of a folder."""
    return arm.replace(",", "").replace(" ", "-")


def finished(values: Mapping[str, Any], folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return results.json of an experiment, run if it is not there."""
    if not (folder / "results.json").exists():
        run_experiment(validate(override(dict(values), overrides)), folder)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def worth(backbone: Path, tables: Mapping[str, Path], out: Path, *, masks: bool) -> dict[str, float | None]:
    """Return the mean over the four sites of the balanced accuracy of a ridge head, and of the Dice of masks."""
    chosen = {"backbone": {"name": str(backbone.resolve())}}
    labels = finished({**LABELLED, **chosen, "path": str(tables["labels"].resolve())}, out / "labels")
    found: dict[str, float | None] = {"balanced accuracy": labels["summary"]["personalised"]["mean"], "Dice": None}
    if masks:
        adapter = {"adapter": {"blocks": 2, "rank": 8}, "path": str(tables["masks"].resolve())}
        drawn = finished({**MASKS, **chosen, **adapter}, out / "masks")
        found["Dice"] = drawn["summary"]["personalised"]["mean"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/pretraining"))
    parser.add_argument("--task", default="reconstruction", choices=["reconstruction", "contrast"])
    parser.add_argument("--splits", default=",".join(SPLITS))
    parser.add_argument("--arms", default=";".join(ARMS))
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--masks", action="store_true", help="also train masks on each backbone")
    parser.add_argument("overrides", nargs="*", help="key.path=value, of pre-training")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tables, rows = prepare(args.data, args.out, args.clients), []
    for seed in SEEDS:  # a whole table is there after the first seed
        for split in args.splits.split(","):
            for arm in args.arms.split(";"):
                out = args.out / f"{args.task}-{split}-{args.clients}"
                table = tables[f"{split}-one" if arm == "one client" else split]
                backbone, explained = pretrained(arm, seed, table, out, args)
                values = worth(backbone, tables, out / f"worth-{named(arm)}-{seed}", masks=args.masks)
                rows.append({"split": split, "arm": arm, "seed": seed, "pretext": explained, **values})
                print(json.dumps(rows[-1]), flush=True)
    print(table_of(rows))


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of means over seeds with 95 % intervals (Student t), in Markdown."""
    columns = ("pretext", "balanced accuracy", "Dice")
    lines = [f"| split | arm | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for split, arm in dict.fromkeys((row["split"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["split"], row["arm"]) == (split, arm)]
        cells = [interval([row[c] for row in own]) if own[0][c] is not None else None for c in columns]
        shown = ["-" if c is None else f"{c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})" for c in cells]
        lines.append(f"| {split} | {arm} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

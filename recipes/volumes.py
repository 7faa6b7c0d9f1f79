"""Hippocampus in MR volumes at four simulated sites: methods beside training alone and pooled training, three seeds.

    python recipes/volumes.py DATA --out results/volumes

DATA holds ``volumes.zip`` (Medical Segmentation Decathlon, task 4; one hospital's volumes). ``--volumes`` of them are
dealt out at random: sites differ by chance alone, so that what is seen is what more volumes are worth.

With ``--starts`` instead: each method from three starts, with one table for all, whose test volumes no start has seen:

- ``random``: random weights, then R rounds with labels.
- ``random, equal steps``: the same for R + P rounds: as many steps in all as ``lwi``.
- ``lwi``: P rounds of learnable weight initialisation by FedAvg over the four sites, without labels; then R rounds.

Steps a round and images a step are the same everywhere. What was finished is not run again, what was interrupted goes
on, and results of other settings are refused.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison_page import compared
from hippocampus import CLASSES, cell, unpack

from confrere.config import override, validate
from confrere.job import run_experiment
from confrere.pretrain import GENERAL, pretraining
from confrere.seeds import numpy_generator

METHODS = ("fedit", "fedper", "local", "pooled")
SEEDS = (0, 1, 2)
UNETR = {"name": "unetr", "patch": [32, 32, 32]}
SETTINGS: dict[str, Any] = {
    "task": "volume-segmentation",
    "method": "fedit",
    "threads": 1,
    "controls": [],
    "data": {"classes": list(CLASSES), "volume": {"size": [48, 64, 48]}, "test": 0.3},
    "backbone": UNETR,
    "train": {"batch_size": 2, "lr": 3e-3, "steps": 12, "balance": "none"},
    "rounds": 10,
    "selection": {"every": 5},
    "record": {"keep": 1},
}
STARTS = ("random", "random, equal steps", "lwi")
# As in hippocampus.py: slabs along the long axis of the hippocampus, a permutation of each volume's own.
LWI = {"name": "lwi", "axis": 1, "per_sample": True}
PARTS = ("train", "test", "train", "val", "train", "train", "test")
SHARED = ("threads", "controls", "train", "selection", "record")


def prepare(data: Path, out: Path, volumes: int, *, split: bool = False) -> Path:
    """Unpack the volumes and write the table of the drawn ones, if wanted with their split; return the CSV."""
    table = out / f"{'starts' if split else 'volumes'}-{volumes}.csv"
    names = unpack(data, out)
    if not table.exists():
        chosen = numpy_generator(0, "volumes").permutation(names)[:volumes]
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "mask", "site", "patient"] + ["split"] * split)
            for i, n in enumerate(chosen):
                part = [PARTS[i // 4 % len(PARTS)]] * split  # the same share of every site
                writer.writerow([f"images/{n}", f"labels/{n}", f"site{i % 4}", n, *part])
    return table


def finished(values: Mapping[str, Any], folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return results.json of an experiment: run, continued, or found; RunError where it was another experiment."""
    run_experiment(validate(override(values, overrides)), folder)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def started(start: str, method: str, seed: int, table: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the mean Dice over sites of a method from a start, and how many slabs the start told right."""
    path, told, backbone = {"path": str(table.resolve()), "seed": seed}, None, UNETR
    rounds = args.rounds + (args.pretext if start == "random, equal steps" else 0)
    if start == "lwi":
        out = args.out / "starts" / f"pretext-{args.pretext}-{seed}"
        shared = {key: SETTINGS[key] for key in SHARED}
        given = {**shared, "data": {"volume": SETTINGS["data"]["volume"]}, "task": LWI, "backbone": UNETR}
        made = finished({**pretraining(given), **path, "rounds": args.pretext}, out, args.overrides)
        told, backbone = made["summary"]["personalised"]["mean"], {"name": str((out / GENERAL).resolve())}
    values = {**SETTINGS, **path, "method": method, "rounds": rounds, "backbone": backbone}
    name = f"{start.replace(',', '').replace(' ', '-')}-{method}-{args.pretext}-{args.rounds}-{seed}"
    results = finished(values, args.out / "starts" / name, args.overrides)
    return {"start": start, "method": method, "seed": seed, "rounds": rounds, "told": told} | {
        "dice": results["summary"]["personalised"]["mean"]
    }


def starts(table: Path, args: argparse.Namespace) -> str:
    """Run every start, method and seed; return the table in Markdown."""
    rows = []
    for seed in map(int, args.seeds.split(",")):  # a whole table is there after the first seed
        for method in args.methods.split(","):
            for start in STARTS:
                rows.append(started(start, method, seed, table, args))
                print(json.dumps(rows[-1]), flush=True)
    lines = ["| method | start | Dice | each seed | against equal steps, points | slabs told |", "|---" * 6 + "|"]
    for method in args.methods.split(","):
        of = {start: [r for r in rows if (r["start"], r["method"]) == (start, method)] for start in STARTS}
        equal = [row["dice"] for row in of["random, equal steps"]]
        for start, own in of.items():
            dice = [row["dice"] for row in own]
            same = start == "random, equal steps"
            gain = "" if same else cell([a - b for a, b in zip(dice, equal, strict=True)], points=True)
            told = cell([row["told"] for row in own]) if start == "lwi" else ""
            cells = [f"`{method}`", start, cell(dice), " ".join(f"{one:.3f}" for one in dice), gain, told]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/volumes"))
    parser.add_argument("--volumes", type=int, default=96)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--starts", action="store_true", help="compare starts")
    parser.add_argument("--pretext", type=int, default=10, help="P, with --starts")
    parser.add_argument("--rounds", type=int, default=10, help="R, with --starts")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with --starts")
    parser.add_argument("overrides", nargs="*", help="key.path=value; with --starts of pretext and labels alike")
    args = parser.parse_intermixed_args()
    table = prepare(args.data, args.out, args.volumes, split=args.starts)
    if args.starts:
        print(starts(table, args))
        return
    experiment = validate(override({**SETTINGS, "path": str(table.resolve())}, args.overrides))
    compared(experiment, args.methods, SEEDS, args.out / "compare", 1)


if __name__ == "__main__":
    main()

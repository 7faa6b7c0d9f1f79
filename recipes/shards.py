"""Adapter shards on HAM10000: what they cost in accuracy, and what forgetting patients costs then.

    python recipes/shards.py DATA --out results/shards --page docs/results/shards.md

DATA as for ``recipes/ham10000.py``; small runs whose last round is kept, three seeds. Forgotten are one training
lesion of a site, and a twentieth of them, by ``confrere forget RUN --patients list.csv --out OUT``. What was done is
not done again.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import torch
from forgetting import SETUPS, cell, draw
from ham10000 import SETTINGS, SMALL, prepare, without_path

from confrere.config import override, validate
from confrere.forgetting.forget import forget
from confrere.forgetting.who import Whom, read_list
from confrere.job import run_experiment
from confrere.record.files import read_json
from confrere.record.machine import machine

METHODS = ("fedit", "shards:shards=2", "shards:shards=4", "local", "pooled")
FORGET = METHODS[:3]
SEEDS = (0, 1, 2)
SITE = SETUPS["ham10000"].site
CHOICES = [*SMALL, "backbone.image_size=56", "adapter.blocks=1", "selection.every=8", "engine.precision=fp32"]


def forgotten(run: Path, out: Path, lists: Path) -> dict[str, dict[str, Any]]:
    """Return what forgetting one lesion, and a twentieth of a site's, cost in ``run``."""
    many, alone = draw(SITE, run, lists / "many.csv"), lists / "one.csv"
    with many.open(newline="") as source, alone.open("w", newline="") as target:
        csv.writer(target).writerows(list(csv.reader(source))[:2])
    found = {}
    for name, file in (("one", alone), ("many", many)):
        done = out / name / "forgetting.json"
        found[name] = read_json(done) if done.exists() else forget(run, Whom(patients=read_list(file)), out / name)
    return found


def steps(costs: list[dict[str, Any]]) -> str:
    """Return the steps of each seed, once where they are the same."""
    return ", ".join(str(each) for each in dict.fromkeys(cost["steps"] for cost in costs))


def page(results: dict[str, list[dict[str, Any]]], costs: dict[str, list[dict[str, Any]]], toml: str, many: int) -> str:
    """Return the results page in Markdown."""
    told = machine()
    lines = [
        "# Adapter shards on HAM10000",
        "",
        "Command: `python recipes/shards.py /path/to/fed_ham10000 --out results/shards --page docs/results/shards.md`. "
        f"{told['cores']} cores of an AMD EPYC, torch {told['torch']}, one thread. Seeds "
        f"{', '.join(map(str, SEEDS))}; mean with a 95 % interval (Student t over seeds). Balanced accuracy on test "
        "lesions, mean over the four sites; one split by lesion for all; nothing was tuned. Steps: optimiser steps of "
        "all sites, in all rounds. Reading, examining and judging cost what they cost in a run, and that is most of "
        "the time where runs are as short as these.",
        "",
        f"| method | balanced accuracy | steps of training | to forget one lesion of {SITE} | {many} lesions |",
        "|---|---|---|---|---|",
    ]
    for method, found in results.items():
        cells = [f"`{method}`", cell([one["summary"]["personalised"]["mean"] for one in found])]
        spent = costs.get(method, [])
        cells += [steps([one["one"]["retraining"] for one in spent])]
        cells += [steps([one[name]["cost"] for one in spent]) for name in ("one", "many")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "## The experiment", "", "```toml", without_path(toml), "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/shards"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    table = prepare(args.data, args.out / "data")
    results: dict[str, list[dict[str, Any]]] = {}
    costs: dict[str, list[dict[str, Any]]] = {}
    toml = ""
    for seed in SEEDS:
        for method in METHODS:
            values = {**SETTINGS, "path": str(table.resolve()), "seed": seed}
            chosen = validate(override(values, [*CHOICES, "workers=1", *args.overrides]))
            experiment, name = chosen.for_method(method), f"{re.sub(r'[^a-z0-9=]+', '-', method)}-{seed}"
            toml, run = toml or experiment.toml(), args.out / name
            if not (run / "results.json").exists():
                run_experiment(experiment, run)
            results.setdefault(method, []).append(read_json(run / "results.json"))
            print(method, seed, results[method][-1]["summary"]["personalised"]["mean"], flush=True)
            if method in FORGET:
                costs.setdefault(method, []).append(forgotten(run, args.out / f"{name}-without", args.out))
                print({key: one["cost"] for key, one in costs[method][-1].items()}, flush=True)
    if args.page:
        many = len((args.out / "many.csv").read_text().splitlines()) - 1
        args.page.write_text(page(results, costs, toml, many))


if __name__ == "__main__":
    main()

"""Whether robust rules hold when some of ten hospitals attack, and what they cost when none does.

    python benchmarks/robustness.py ham10000-pooled.csv --out robust --jobs 2 --result robustness.json

DATA is any folder or table of one pooled set (no column ``site``); it is dealt out to ``--sites`` simulated hospitals,
the first ``--byzantine`` of which attack in every round. Every cell is one run of FedIT: rule x attack x seed; a cell
that is finished is not run again. A seed also deals the images out anew. The last round counts, whatever its validation
score, and the score is the balanced accuracy over all hospitals' test images. A run in which no hospital could train
on, as the shared model was destroyed, counts as 1/K.

``backdoor:0.5`` poisons data instead of updates (half of the attackers' training images carry a mark and are called
the first class); for it, and for no attacker, the share of marked test images of other classes that are taken for that
class is told as well.

Rules: ``mean`` (nothing in front of it: the gate compares no sizes), ``mean+gate`` (its default limits),
``mean+gate=5`` (changes of five times the median are refused), ``mean+canonical``, and all of
``confrere.federation.robust``, each without the gate, so that only the rule defends.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from confrere.config import override, validate
from confrere.data.appearance import mark
from confrere.errors import RunError
from confrere.federation.robust import RULES
from confrere.job import Prepared, open_data, prepare, train
from confrere.record.files import read_json, read_state, write_json
from confrere.record.machine import machine
from confrere.record.run import Run

ROWS = ("mean", "mean+gate", "mean+gate=5", "mean+canonical", *(name for name in RULES if name != "mean"))
ATTACKS = "sign-flip:10,scaling:100,alie:1.5,inner-product:1,noise:10,gauge:100"
SETTINGS = [
    *("method=fedit", "controls=[]", "rounds=6", "threads=1", "workers=1"),
    *("train.steps=8", "train.lr=3e-3", "train.batch_size=16"),
    *("backbone.image_size=70", "adapter.blocks=1", "engine.precision=bf16"),
]
NONE, BACKDOOR = "none", "backdoor"


def settings(args: argparse.Namespace, seed: int) -> list[str]:
    """Return what all cells of a seed have in common."""
    dealt = f'data.partition={{by="dirichlet", alpha={args.alpha}, sites={args.sites}}}'
    fixed = [*SETTINGS, dealt, f"seed={seed}", f"split_seed={seed}", *args.set]
    rounds = validate(override({"path": "x"}, fixed)).rounds
    return [*fixed, f"selection.every={rounds}", "record.keep=1"]


def cell_settings(row: str, attack: str, args: argparse.Namespace) -> list[str]:
    """Return what makes one cell."""
    rule, *extras = row.split("+")
    chosen = [f"federation.rule={rule}", f"federation.byzantine={0 if rule == 'mean' else args.byzantine}"]
    if "gate" not in extras:  # its default limits
        limit = float(next((extra.removeprefix("gate=") for extra in extras if extra.startswith("gate=")), 0))
        chosen += [f"gate.norm={limit}", f"gate.factor={limit}"]
    if "canonical" in extras:
        chosen.append("federation.canonical=true")
    if attack != NONE and not attack.startswith(BACKDOOR):
        name, _, strength = attack.partition(":")
        chosen += [f"attack.name={name}", f"attack.strength={float(strength)}", f"attack.sites={attackers(args)}"]
    return chosen


def attackers(args: argparse.Namespace) -> str:
    """Return the names of the attacking sites, as TOML."""
    return json.dumps([f"site_{k + 1:02d}" for k in range(args.byzantine)])


def poison(attack: str, target: str, args: argparse.Namespace) -> list[str]:
    """Return the settings of a backdoor; none for other attacks."""
    if not attack.startswith(BACKDOOR):
        return []
    share = float(attack.partition(":")[2])
    return [f'data.shift=[{{kind="backdoor", sites={attackers(args)}, strength={share}, classes=["{target}"]}}]']


@functools.cache
def prepared(data: str, out: Path, fixed: tuple[str, ...]) -> Prepared:
    """Return data and backbone of one seed, read once a process."""
    experiment = validate(override({"path": data}, fixed))
    torch.set_num_threads(1)
    return prepare(experiment, open_data(experiment, out), lambda event: None)


def score(folder: Path, sites: list[str]) -> float:
    """Return the balanced accuracy over all test images."""
    parts = [read_state(folder / "sites" / s / "test-personalised.safetensors")[0]["test"] for s in sites]
    labels = np.concatenate([p["labels"].numpy() for p in parts])
    said = np.concatenate([p["probabilities"].numpy().argmax(1) for p in parts])
    return float(np.mean([(said[labels == k] == k).mean() for k in np.unique(labels)]))


def deceived(task: Prepared, folder: Path) -> float:
    """Return the share of marked test images, of all classes but the first, that are taken for the first class."""
    method, server, hits = task.method, Run(folder).server(task.experiment.rounds), []
    for site in task.federation.sites:
        rows = site.indices("test")
        rows = rows[site.labels[rows] != 0]
        params = method.personal(method.broadcast(server, site.name), {})
        for start in range(0, len(rows), 64):
            images = np.asarray(site.images[rows[start : start + 64]])
            seen = task.backbone.prefix(mark(images, np.ones(len(images), dtype=bool)))
            with torch.no_grad():
                hits += (method.scores(task.backbone, params, seen).argmax(1) == 0).tolist()
    return float(np.mean(hits))


def run_cell(args: argparse.Namespace, row: str, attack: str, seed: int) -> str:
    """Run one cell, unless its result is there; return one line about it."""
    folder = args.out / "cells" / row / attack.replace(":", "_") / str(seed)
    if (folder / "cell.json").exists():
        return ""
    began = time.perf_counter()
    fixed = settings(args, seed)
    data, home = str(args.data.resolve()), args.out / f"seed_{seed}"
    task = prepared(data, home, tuple(fixed))
    extra = poison(attack, task.federation.classes[0], args)
    fixed, task = [*fixed, *extra], prepared(data, home, tuple([*fixed, *extra]))
    cell = validate(override({"path": task.experiment.path}, [*fixed, *cell_settings(row, attack, args)]))
    found: dict[str, Any] = {"row": row, "attack": attack, "seed": seed}
    try:
        if not (folder / "results.json").exists():
            train(replace(task, experiment=cell), folder)
        found["score"] = score(folder, list(task.data))
        if BACKDOOR in args.attacks and attack.split(":")[0] in (NONE, BACKDOOR):
            found["deceived"] = deceived(replace(task, experiment=cell), folder)
    except RunError as error:  # every site refuses a model that gives values which are not finite
        found |= {"score": 1 / len(task.federation.classes), "destroyed": error.what}
    events = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in events]
    found["refused"] = sum(1 for e in lines if e.get("event") == "failure" and e.get("site"))
    found["seconds"] = round(time.perf_counter() - began, 1)
    write_json(folder / "cell.json", found)
    return f"{row:20} {attack:18} seed {seed}: {found['score']:.3f} ({found['seconds']} s)"


def interval(values: list[float]) -> dict[str, Any]:
    """Return the mean of a value a seed with its 95 % Student t interval; None where there is one seed."""
    n, middle = len(values), sum(values) / len(values)
    half = float(student.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"mean": round(middle, 2), "half": None if half is None else round(half, 2), "seeds": n}


def summarise(cells: list[dict[str, Any]], attacks: list[str], rows: list[str]) -> dict[str, Any]:
    """Return percent and points lost, by rule and attack, each seed against its own attack-free run."""
    at = {(c["row"], c["attack"], c["seed"]): 100 * c["score"] for c in cells}
    seeds = sorted({c["seed"] for c in cells})

    def lost(row: str, attack: str, against: str) -> dict[str, Any] | None:
        pairs = [(at.get((against, NONE, s)), at.get((row, attack, s))) for s in seeds]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        return interval(known) if known else None

    table: dict[str, Any] = {}
    for row in rows:
        clean = [at[row, NONE, s] for s in seeds if (row, NONE, s) in at]
        losses = {a: found for a in attacks if (found := lost(row, a, row))}
        if clean and losses:
            worst = max(losses, key=lambda a: losses[a]["mean"])
            table[row] = {"clean": interval(clean), "lost": losses, "worst": worst, "cost": lost(row, NONE, "mean")}
            for attack in (NONE, BACKDOOR):
                known = [c for c in cells if c["row"] == row and c["attack"].split(":")[0] == attack]
                if taken := [100 * c["deceived"] for c in known if "deceived" in c]:
                    table[row][f"deceived_{attack}"] = interval(taken)
    return table


def judge(table: dict[str, Any]) -> list[str]:
    """Return G17 and G18 in words."""
    said = []
    for row, one in table.items():
        worst = one["lost"][one["worst"]]["mean"]
        costs = "" if one["cost"] is None else f"; costs {one['cost']['mean']:+.1f} points without an attacker"
        said.append(f"{row}: loses {worst:+.1f} points under its worst attack ({one['worst']}){costs}")
        if "deceived_backdoor" in one:
            was, now = (one[f"deceived_{attack}"]["mean"] for attack in (NONE, BACKDOOR))
            said.append(f"{row}: {now:.0f} % of marked images deceive it with the backdoor, {was:.0f} % without")
    if "mean" in table:
        bites = [a for a, found in table["mean"]["lost"].items() if found["mean"] >= 20]
        said.append(f"control: the bare mean loses at least 20 points under {len(bites)} attacks ({', '.join(bites)})")
    return said


def markdown(table: dict[str, Any], attacks: list[str]) -> str:
    """Return the table of the page."""

    def shown(found: dict[str, Any] | None) -> str:
        if not found:
            return "-"
        return f"{found['mean']:.1f}" + ("" if found["half"] is None else f" ± {found['half']:.1f}")

    lines = ["| rule | no attacker | " + " | ".join(attacks) + " |", "|---" * (len(attacks) + 2) + "|"]
    for row, one in table.items():
        cells = [shown(one["lost"].get(a)) for a in attacks]
        cells = [f"**{cell}**" if a == one["worst"] else cell for a, cell in zip(attacks, cells, strict=True)]
        lines.append(f"| {row} | {shown(one['clean'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--byzantine", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet partition")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rules", default=",".join(ROWS))
    parser.add_argument("--attacks", default=ATTACKS, help="name:strength,...")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other keys of the experiment")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so long")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds, rows = [int(s) for s in args.seeds.split(",")], args.rules.split(",")
    attacks = args.attacks.split(",")
    todo = [(row, attack, seed) for seed in seeds for attack in (NONE, *attacks) for row in rows]
    work(args, todo)
    found = [args.out / "cells" / row / a.replace(":", "_") / str(seed) / "cell.json" for row, a, seed in todo]
    cells = [read_json(path) for path in found if path.exists()]
    table = summarise(cells, attacks, rows)
    print(markdown(table, attacks))
    print("\n".join(judge(table)))
    if args.result:
        write_json(
            args.result,
            {
                "command": shlex.join(["python", *(Path(a).name if Path(a).exists() else a for a in sys.argv)]),
                "date": date.today().isoformat(),
                "machine": machine(),
                "settings": settings(args, 0),
                "sites": args.sites,
                "byzantine": args.byzantine,
                "images": images(args, seeds[0]),
                "planned": len(todo),
                "cells": cells,
                "table": table,
                "goals": judge(table),
            },
        )


def images(args: argparse.Namespace, seed: int) -> int:
    """Return the number of images, after duplicates are left out."""
    with (args.out / f"seed_{seed}" / "splits.csv").open(encoding="utf-8") as rows:
        return sum(1 for _ in rows) - 1


def work(args: argparse.Namespace, todo: list[tuple[str, str, int]]) -> None:
    """Run the cells in ``--jobs`` processes; a seed's data are read by one of them first."""
    end = time.monotonic() + 60 * args.minutes
    for seed in dict.fromkeys(seed for _, _, seed in todo):
        mine = [cell for cell in todo if cell[2] == seed]
        print(run_cell(args, *mine[0]) or f"seed {seed}: begun before", flush=True)
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(timely, end, args, *cell) for cell in mine[1:]]
            for one in waiting:
                print(one.result() or ".", flush=True)


def timely(end: float, args: argparse.Namespace, row: str, attack: str, seed: int) -> str:
    """Run a cell unless the time is over."""
    return "" if time.monotonic() > end else run_cell(args, row, attack, seed)


if __name__ == "__main__":
    main()

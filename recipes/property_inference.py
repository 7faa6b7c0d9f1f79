"""Property inference on HAM10000: which simulated hospitals see many melanomas, from sums of LoRA updates alone.

    python recipes/property_inference.py DATA --out results/property

DATA is as for recipes/ham10000.py. 8 hospitals of 90 real images are drawn anew for every seed: at three of them 40 %
of the images are melanomas, at the others 10 %. They train one shared adapter (``fedit``) under secure aggregation,
half of them in a round. The server attacks what it saw. Runs and attacks that are done are kept.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ham10000 import prepare
from property_digits import auc, interval

from confrere.audits.audit import Choice
from confrere.audits.property import least_squares, posterior, ridge
from confrere.audits.property_inference import Inferred, infer, skill
from confrere.audits.property_shadows import Property
from confrere.audits.tapped import open_run
from confrere.config import override, validate
from confrere.job import run_experiment
from confrere.record.files import write_json
from confrere.seeds import numpy_generator

SITES, IMAGES, MANY, FEW, POSITIVE, SIZE = 8, 90, 0.4, 0.1, 3, 42
SETTINGS: dict[str, Any] = {
    "method": "fedit",
    "controls": [],
    "threads": 1,
    "workers": 1,
    "rounds": 12,
    "backbone": {"name": "dinov2-small-imgfocus", "depth": 8, "image_size": SIZE},
    "adapter": {"blocks": 1, "rank": 4},
    "train": {"steps": 3, "batch_size": 8, "lr": 2e-3, "balance": "none"},
    "selection": {"every": 12},
    "federation": {"fraction": 0.5},
    "gate": {"norm": 0.0, "factor": 0.0},
    "secure": {"aggregation": True},
}
CONDITIONS: dict[str, list[str]] = {
    "half drawn": [],
    "groups": ["federation.sampling=groups", "federation.min_replies=4", "secure.threshold=4"],
    "balanced": ["train.balance=sampling"],
}


def hospitals(table: Path, out: Path, seed: int) -> Path:
    """Write the table of one seed's hospitals, lesions undivided; return it."""
    with table.open(newline="") as source:
        rows = list(csv.DictReader(source))
    rng = numpy_generator(seed, "hospitals")
    first = {row["lesion"]: row for row in (rows[i] for i in rng.permutation(len(rows)))}  # one picture a lesion
    pools = {kind: [r for r in first.values() if (r["label"] == "mel") == kind] for kind in (True, False)}
    many = set(rng.permutation(SITES)[:POSITIVE].tolist())
    path = out / f"hospitals-{seed}.csv"
    with path.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["path", "label", "site", "lesion"])
        for site in range(SITES):
            melanomas = round(IMAGES * (MANY if site in many else FEW))
            for kind, count in ((True, melanomas), (False, IMAGES - melanomas)):
                for _ in range(count):
                    row = pools[kind].pop()
                    picture = (table.parent / row["path"]).resolve()
                    link = out / "pictures" / picture.name
                    link.parent.mkdir(parents=True, exist_ok=True)
                    if not link.exists():
                        link.hardlink_to(picture)
                    writer.writerow([f"pictures/{picture.name}", row["label"], f"hospital-{site:02d}", row["lesion"]])
    return path


def attack(run: Path, shadows: int, rounds: int, found: Path) -> dict[str, Any]:
    """Return what the server infers of one run, from ``found`` where it is done."""
    if found.exists():
        done: dict[str, Any] = json.loads(found.read_text())
        return done
    opened = open_run(run)
    melanoma = list(opened.federation.classes).index("mel")
    asked = Property(name="melanomas", marks={s: opened.data[s].labels == melanoma for s in opened.sites})
    write_json(found, summary(infer(opened, asked, Choice(notify=print), shadows=shadows, rounds=rounds)))
    return attack(run, shadows, rounds, found)


def summary(found: Inferred) -> dict[str, Any]:
    """Return the numbers of a table's row."""
    many = found.truth > (MANY + FEW) / 2
    inside = (found.truth >= found.estimate.low) & (found.truth <= found.estimate.high)
    mixed = found.mixed
    level = posterior(replace(found.system, shift=0.0), found.guess / found.high)
    trusted = np.clip(level.mean, 0, 1) * found.high
    inside_trusted = (found.truth >= level.low * found.high) & (found.truth <= level.high * found.high)
    return {
        "AUC": auc(many, found.estimate.mean),
        "AUC, control": float(np.mean([auc(many, one) for one in mixed])),
        "AUC, ridge": auc(many, ridge(found.system)),
        "AUC, least squares": auc(many, least_squares(found.system)),
        "skill": skill(found.estimate.mean, found.truth, found.guess),
        "skill, control": float(np.mean([skill(one, found.truth, found.guess) for one in mixed])),
        "AUC, level of scores trusted": auc(many, level.mean),
        "skill, level of scores trusted": skill(trusted, found.truth, found.guess),
        "covered, level of scores trusted": float(inside_trusted.mean()),
        "mean error of the share": float(np.abs(found.estimate.mean - found.truth).mean()),
        "the same of the mean guess": float(np.abs(found.guess - found.truth).mean()),
        "covered": float(inside.mean()),
        "accuracy on single updates": found.accuracy,
        "persistence": found.system.persistence,
        "rank": found.seen.rank,
        "sites identifiable": len(found.seen.single),
        "condition": found.seen.condition,
        "system": {key: np.asarray(value).tolist() for key, value in asdict(found.system).items() if value is not None},
        "estimates": found.estimate.mean.tolist(),
        "truth": found.truth.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/property"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shadows", type=int, default=30, help="of either kind, in each round")
    parser.add_argument("--attacked", type=int, default=12, help="rounds that are attacked")
    parser.add_argument("--only", choices=list(CONDITIONS), action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = prepare(args.data, args.out / "data")
    for name in args.only or CONDITIONS:
        rows = []
        for seed in range(args.seeds):
            spot = args.out / f"{name.replace(' ', '-')}-{seed}"
            path = hospitals(table, table.parent, seed)
            values = {**SETTINGS, "path": str(path.resolve()), "seed": seed, "split_seed": seed}
            run_experiment(validate(override(values, CONDITIONS[name])), spot)
            rows.append(attack(spot, args.shadows, args.attacked, args.out / f"{spot.name}.json"))
            print(name, seed, {k: v for k, v in rows[-1].items() if not isinstance(v, list)}, flush=True)
        print(f"\n## {name}")
        for key in [k for k, v in rows[0].items() if isinstance(v, float | int)]:
            print(f"| {key} | {interval([row[key] for row in rows])} |", flush=True)


if __name__ == "__main__":
    main()

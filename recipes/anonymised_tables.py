"""What k and epsilon cost on UCI Adult and Diabetes-130: a federated model on raw, generalised and noisy tables.

    python recipes/anonymised_tables.py DATA --out results/anonymised-tables --page docs/results/anonymised-tables.md

DATA holds ``uci_adult/adult.csv`` (Becker and Kohavi 1996, CC BY 4.0) and ``uci_diabetes130/dataset_diabetes.zip``
(Clore et al. 2014, CC BY 4.0). Each seed draws units, deals them to three sites and splits them anew, and trains anew.
What is done already in ``--out`` is not done again. Nothing is tuned.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anonymised_sets import SETS, SITES, Set, dealt
from sklearn.metrics import roc_auc_score

from confrere import run_experiment
from confrere.anonymise.attacks import Target, intersection, membership
from confrere.anonymise.dp_learner import SiteRows, chance, fit, noise_for
from confrere.anonymise.dp_table import noisy_table
from confrere.anonymise.encode import encode, encode_items, feature_names
from confrere.anonymise.generalise import anonymise, losses
from confrere.anonymise.mapping import as_mapping, assign, entries, mapped_items
from confrere.anonymise.plan import Plan, make_plan
from confrere.anonymise.records import Records, make_records
from confrere.anonymise.table import examine, published_items, rows_of
from confrere.config import override, validate
from confrere.data.numbers import standardise
from confrere.predict import Predictor
from confrere.record.files import read_json, write_bytes, write_json
from confrere.record.machine import machine
from confrere.seeds import derive

SEEDS, KS, M, EPSILONS, DELTA, ROUNDS = (0, 1, 2), (5, 20, 60), 2, (0.2, 1.0, 5.0), 1e-5, 100
SHARED = 0.2  # of a site's units that are in another site's table, too, for the intersection
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "controls": [],
    "rounds": 10,
    "method": {"name": "fedit"},
    "backbone": {"name": "mlp"},
    "adapter": {"rank": 64},
    "train": {"batch_size": 32, "lr": 1e-3, "steps": 10, "balance": "none"},
    "engine": {"precision": "fp32"},
}
Matrix = np.ndarray


class Task:
    """A data set of one seed: plans, records by site and part, and the columns of every model."""

    def __init__(self, of: Set, rows: list[dict[str, str]], seed: int, out: Path) -> None:
        self.set, self.seed, self.out = of, seed, out
        trees = out / "trees"
        for name, paths in of.trees.items():
            write_bytes(trees / f"{name}.csv", "".join(",".join(path) + "\n" for path in paths).encode())
        self.plan = make_plan({**of.plan, "k": KS[0], "m": M, "target": "target", "patient": "unit"}, trees)
        names: dict[str, int] = {}
        self.records = {
            site: {
                part: make_records(enumerate(cells, 2), self.plan, where=part, names=names)
                for part, cells in parts.items()
            }
            for site, parts in dealt(rows, of.units, seed).items()
        }

    def plan_of(self, k: int) -> Plan:
        """Return the plan with another k."""
        return replace(self.plan, k=k)

    def clear(self, records: Records) -> Matrix:
        """Return (N, F) the columns of records in the clear."""
        return np.hstack([encode(self.plan, None, records), encode_items(self.plan, records.items)])

    def truth(self, records: Records) -> Matrix:
        """Return (N,) the number of each record's target."""
        return np.array([float(self.set.targets.index(kept[0])) for kept in records.kept])

    def all(self, part: str) -> Records:
        """Return the records of all sites of a part."""
        return joined([one[part] for one in self.records.values()])


def joined(many: Sequence[Records]) -> Records:
    """Return several tables as one."""
    return Records(
        codes=np.concatenate([one.codes for one in many]),
        numbers=np.concatenate([one.numbers for one in many]),
        items=tuple(items for one in many for items in one.items),
        kept=tuple(kept for one in many for kept in one.kept),
        units=np.concatenate([one.units for one in many]),
    )


# --- what each arm trains on: by site the columns, targets and units of its table

Rows = dict[str, SiteRows]


def raw(task: Task) -> Rows:
    return {
        site: SiteRows(task.clear(parts["train"]), task.truth(parts["train"]), parts["train"].units)
        for site, parts in task.records.items()
    }


def made_up(task: Task, epsilon: float) -> Rows:
    made = {}
    for site, parts in task.records.items():
        seed = derive(task.seed, "noisy", site, str(epsilon))
        drawn = noisy_table(task.plan, parts["train"], task.set.targets, epsilon=epsilon, seed=seed)
        made[site] = SiteRows(task.clear(drawn), task.truth(drawn), drawn.units)
    return made


def generalised(task: Task, k: int) -> tuple[Rows, dict[str, Target], dict[str, Any]]:
    """Return the tables of every site, as published, and what was counted and lost."""
    plan, made, targets, told = task.plan_of(k), {}, {}, {}
    for site, parts in task.records.items():
        records = parts["train"]
        began = time.perf_counter()
        release = anonymise(plan, records)
        seconds = time.perf_counter() - began
        counted = examine(plan, rows_of(plan, records, release), records.units)
        if not counted["holds"]:
            raise SystemExit("a table does not hold k")
        boxes = [release.classes[number].box for number in release.class_of]
        x = np.hstack([encode(plan, boxes, None), encode_items(plan, published_items(plan, records, release))])
        made[site] = SiteRows(x, task.truth(records), records.units)
        targets[site] = Target(plan, records, release)
        told[site] = {**counted, **losses(plan, records, release), "rows": len(records), "seconds": seconds}
    return made, targets, told


def mapper(task: Task, k: int, targets: dict[str, Target], how: str) -> Any:
    """Return what turns records into the columns of their class in the union of all sites' mappings."""
    plan = task.plan_of(k)
    union = entries(plan, as_mapping(plan, {site: one.release for site, one in targets.items()}))

    def mapped(records: Records) -> Matrix:
        of = assign(plan, records, union, how=how)  # type: ignore[arg-type]
        boxes = [union[number].box for number in of]
        return np.hstack([encode(plan, boxes, None), encode_items(plan, mapped_items(plan, records, union, of))])

    return mapped


# --- models


def constants(task: Task) -> dict[str, tuple[float, float]]:
    """Return public constants for every column: nothing is fitted on records."""
    names = feature_names(task.plan)
    return {f"f{n}": (0.5, 0.29) if name in task.plan.numeric else (0.0, 1.0) for n, name in enumerate(names)}


def federated(task: Task, name: str, rows: Rows, prepare: Any, overrides: list[str]) -> Any:
    """Train the frame's perceptron on ``rows``; return what gives the chance of target 1 from columns.

    Validation rows, which choose the round, are those of each site, shown as new records are (``prepare``).
    """
    folder = task.out / name
    table, fixed = folder / "table.csv", constants(task)
    if not (folder / "run" / "results.json").exists():
        lines = [["site", "label", "patient", "split", *fixed]]
        for site, parts in task.records.items():
            for part, x, y, units in (
                ("train", rows[site].features, rows[site].targets, rows[site].units),
                *((p, prepare(parts[p]), task.truth(parts[p]), parts[p].units) for p in ("val", "test")),
            ):
                for values, target, unit in zip(np.round(x, 6), y, units, strict=True):
                    cells = [f"{value:g}" for value in values]
                    lines.append([site, task.set.targets[int(target)], f"{site}-{part}-{unit}", part, *cells])
        folder.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as file:
            csv.writer(file).writerows(lines)
        data = {"constants": fixed, "classes": list(task.set.targets)}
        values = {**SETTINGS, "seed": task.seed, "path": str(table.resolve()), "data": data}
        run_experiment(validate(override(values, overrides)), folder / "run")
    predictors = {site: Predictor(folder / "run", site) for site in SITES}

    def chances(x: Matrix) -> Matrix:
        shaped = standardise(x[:, None, :].astype(np.float32), np.ones(len(x), dtype=bool), list(fixed), fixed)
        one = predictors["large"]  # fedit: every site predicts with the same model, but for its temperature
        return one.probabilities(shaped)[:, one.classes.index(task.set.targets[1])]

    return chances


def judged(task: Task, chances: Any, show: Any) -> dict[str, float]:
    """Return accuracy and AUC on all sites' test records, and the attack on the model with its control."""
    test, val, train = task.all("test"), task.all("val"), task.all("train")
    found = {}
    for name, way in (("mapped", show), ("raw", task.clear)):
        p, y = chances(way(test)), task.truth(test)
        found |= {f"auc_{name}": float(roc_auc_score(y, p)), f"accuracy_{name}": float(((p > 0.5) == y).mean())}
    loss = {
        part: surprise(chances(show(some)), task.truth(some))
        for part, some in (("in", train), ("out", test), ("val", val))
    }
    found["told"] = area(loss["in"], loss["out"])
    found["told_control"] = area(loss["val"], loss["out"])
    return found


def surprise(p: Matrix, y: Matrix) -> Matrix:
    return -np.log(np.clip(np.where(y == 1, p, 1 - p), 1e-12, 1))


def area(inside: Matrix, outside: Matrix) -> float:
    """Return the area under the curve of telling members by a small loss."""
    truth = [1] * len(inside) + [0] * len(outside)
    return float(roc_auc_score(truth, -np.concatenate([inside, outside])))


# --- one seed of one data set


def trained(task: Task, name: str) -> tuple[Rows, Any, dict[str, Any], dict[str, Target]]:
    """Return the tables of an arm, what shows new records as they are shown, what was counted, and releases."""
    kind, _, value = name.partition("-")
    if kind == "k":
        rows, targets, told = generalised(task, int(value))
        return rows, mapper(task, int(value), targets, "box"), {"sites": told}, targets
    return (made_up(task, float(value)) if kind == "noisy" else raw(task)), task.clear, {}, {}


def arm(task: Task, name: str, overrides: list[str]) -> dict[str, Any]:
    """Return the scores of an arm: ``mlp:`` of the frame's perceptron, else of logistic regression, with attacks."""
    if name.startswith("mlp:"):
        rows, show, _, _ = trained(task, name.removeprefix("mlp:"))
        return judged(task, federated(task, name.replace(":", "-"), rows, show, overrides), show)
    kind, _, value = name.partition("-")
    rows, show, found, targets = trained(task, name)
    private: dict[str, Any] = {}
    if kind == "dpsgd":
        private = {"clip": 1.0, "sigma": noise_for(float(value), DELTA, ROUNDS), "seed": derive(task.seed, name)}
    weights = fit(list(rows.values()), rounds=ROUNDS, lr=2.0, **private)
    found |= judged(task, lambda x: chance(x, weights), show) | private
    if kind != "k":
        return found
    test = task.all("test")
    p = chance(mapper(task, int(value), targets, "mahalanobis")(test), weights)
    found["auc_mahalanobis"] = float(roc_auc_score(task.truth(test), p))
    return found | attacked(task, int(value), targets)


def attacked(task: Task, k: int, targets: dict[str, Target]) -> dict[str, Any]:
    """Return attacks on tables: membership in the middle one; the large one and one that overlaps, intersected."""
    middle = targets["middle"]
    found = {"membership": membership(middle, middle.records, task.all("test"), seed=task.seed)}
    large, other = task.records["large"]["train"], task.records["middle"]["train"]
    units = np.unique(large.units)
    shared = units[: int(SHARED * len(units))]
    copied = joined([other, large.take(np.flatnonzero(np.isin(large.units, shared)))])
    plan = task.plan_of(k)
    second = Target(plan, copied, anonymise(plan, copied))
    return found | {"intersection": intersection(targets["large"], second, most=100, seed=task.seed)}


ARMS = ("raw", *(f"k-{k}" for k in KS), *(f"{kind}-{e:g}" for kind in ("noisy", "dpsgd") for e in EPSILONS))
OF_FRAME = ("mlp:raw", "mlp:k-5", "mlp:noisy-1")
"""Arms on which the frame's perceptron is trained, too."""


def results(data: Path, out: Path, names: Sequence[str], seeds: Sequence[int], overrides: list[str]) -> dict[str, Any]:
    """Return ``{set: {arm: [found of each seed]}}``; each is computed once."""
    made: dict[str, Any] = {name: {one: [] for one in (*ARMS, *OF_FRAME)} for name in names}
    rows: dict[str, list[dict[str, str]]] = {}
    for arms, seed, name in itertools.product((ARMS, OF_FRAME), seeds, names):
        task: Task | None = None
        for one in arms:
            kept = out / name / str(seed) / f"{one.replace(':', '-')}.json"
            if not kept.exists():
                rows[name] = rows.get(name) or SETS[name].rows(data)
                task = task or Task(SETS[name], rows[name], seed, out / name / str(seed))
                began = time.perf_counter()
                found = arm(task, one, overrides)
                write_json(kept, {**found, "seconds": time.perf_counter() - began})
                print(name, seed, one, json.dumps(found)[:200], flush=True)
            made[name][one].append(read_json(kept))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/anonymised-tables"))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    found = results(args.data, args.out, args.sets.split(","), seeds, args.overrides)
    summary = {"results": found, "seeds": seeds, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    write_json(args.out / "results.json", summary)
    if args.page:
        from anonymised_page import page

        write_bytes(args.page, page(summary, "python recipes/anonymised_tables.py DATA").encode())


if __name__ == "__main__":
    main()

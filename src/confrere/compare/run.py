"""Train every method with every seed on every data set, and say what the results are evidence for."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from confrere.compare.cells import Cell, Notify, folder, run_cells
from confrere.compare.data import DataSet, open_sets, origins, own_choices
from confrere.compare.evidence import between, by_hospital, overall, ranking, site_scores
from confrere.compare.grid import Grid
from confrere.compare.recommend import CONTROLS, recommend
from confrere.compare.table import row, scores_of, targets
from confrere.compare.tuning import tune, tuning_seed, with_values
from confrere.config import Experiment
from confrere.errors import ConfigError
from confrere.metrics.mean_gain import mean_score
from confrere.record.files import read_json, write_json
from confrere.record.machine import machine
from confrere.record.run import Run


def compare(
    experiments: Experiment | Sequence[Experiment],
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 1,
    trials: int = 0,
    controls: bool = True,
    target: float | None = None,
    names: Sequence[str] = (),
    notify: Notify = lambda event: None,
) -> dict[str, Any]:
    """Train every method with every seed on every data set into ``out/cells`` and write comparison.json.

    A training is kept by what decides its result (:mod:`confrere.compare.cells`): a comparison that was stopped
    continues, and one with another list of methods or seeds trains only what is new.

    Args:
        experiments: one for each data set: everything that is the same for all methods. They may differ in
            :data:`confrere.compare.data.OWN` only.
        methods: labels (see :meth:`confrere.config.Experiment.for_method`); the first is tested against the others.
        seeds: of training; the split of a data set is the same for all.
        out: directory of the comparison.
        jobs: trainings at a time, each in its own process with ``experiment.threads`` threads.
        trials: of tuning, for every method on every data set; 0 takes the settings as they are.
        controls: whether ``local`` and ``pooled`` are added to the methods.
        target: validation score whose price in bytes and seconds is reported; default: local-only's.
        names: what each data set is called; default: what its federation is.
        notify: called with each event.

    Raises:
        ConfigError: unknown method or key, no seed, data sets that differ in more than their data. RunError: a
            training failed, or another process is using ``out``. MissingExtraError: trials without the extra "tune".
    """
    given = [experiments] if isinstance(experiments, Experiment) else list(experiments)
    labels = [*methods, *(name for name in CONTROLS if controls and name not in methods)]
    _check(given, methods, labels, seeds, trials)
    with Run(out).lock():
        sets = open_sets(given, names)
        found = tune(out, sets, labels, seeds, trials, jobs=jobs, notify=notify) if trials else []
        chosen = {(one["method"], one["data"]): one["values"] for one in found}
        cells = {
            (label, one.name, seed): _cell(one, label, seed, chosen.get((label, one.name), {}))
            for one in sets
            for seed in seeds
            for label in labels
        }
        run_cells(out, list(cells.values()), jobs=jobs, notify=notify)
        where = {key: folder(out, cell) for key, cell in cells.items()}
        grid = Grid(labels=labels, sets=[one.name for one in sets], seeds=seeds, where=where, origin=origins(sets))
        result = {
            **summarise(grid, target),
            **_provenance(sets, cells, out),
            "tuning": _tuning(found, trials, seeds),
            "command": _command(methods, seeds, len(sets), trials, controls, target),
        }
        write_json(out / "comparison.json", result)
    return result


def _check(
    experiments: Sequence[Experiment], methods: Sequence[str], labels: Sequence[str], seeds: Sequence[int], trials: int
) -> None:
    """Raise ConfigError for a wrong name, option or key, before anything is trained."""
    if not experiments or not all(len(set(part)) == len(part) and part for part in (methods, seeds)):
        raise ConfigError(
            "give methods, seeds and data, each once", fix="--methods fedopal,local --seeds 0,1,2", code="comparison"
        )
    own_choices(experiments)
    for label in labels:
        for one in experiments:
            one.for_method(label)
        if trials and "train.lr" in [part.partition("=")[0].strip() for part in label.split(":")]:
            fix = "leave it out, or do not tune"
            raise ConfigError(
                f"{label} sets the learning rate, which tuning chooses", where="--methods", fix=fix, code="comparison"
            )


def _provenance(sets: Sequence[DataSet], cells: Mapping[tuple[str, str, int], Cell], out: Path) -> dict[str, Any]:
    """Return which cells the numbers are of, and of which data."""
    first = folder(out, next(iter(cells.values())))
    return {
        "cells": [{"method": m, "data": d, "seed": s, "cell": cell.digest} for (m, d, s), cell in cells.items()],
        "data": [{"name": one.name, **one.facts} for one in sets],
        "federation": _federation(sets, read_json(first / "federation.json")),
        "experiment": sets[0].experiment.model_copy(update={"path": sets[0].name}).toml(),  # not where it lies
    }


def summarise(grid: Grid, target: float | None = None) -> dict[str, Any]:
    """Return what finished runs say: rows, tests, ranks and a recommendation."""
    aims = targets(grid, target)
    rows = [row(grid, label, aims) for label in grid.labels]
    sites = site_scores(grid)
    pairs = overall(grid, sites)
    for one in rows:
        if len(grid.seeds) == 1 and one[grid.headline] and len(sites) == len(grid.sites()):
            patients = mean_score(sites, one["name"])  # chance between patients, where seeds can say nothing
            one[grid.headline] |= {"low": patients["low"], "high": patients["high"]}
        others = [name for name in CONTROLS if name in grid.labels and name != one["name"]]
        one["gains"] = {name: between(pairs, one["name"], name) for name in others}
    first, local = by_hospital(grid)
    return {
        "task": grid.task,
        "methods": rows,
        "overall": pairs,
        "pairs": first,
        "local_pairs": local,
        "ranks": ranking(grid),
        "recommendation": recommend(rows, pairs, local, metric=grid.headline),
        "targets": aims,
        "intervals": "seeds" if len(grid.seeds) > 1 else "patients",
        "scores": scores_of(grid),
        "seeds": list(grid.seeds),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cell(one: DataSet, label: str, seed: int, values: dict[str, Any]) -> Cell:
    experiment = with_values(one.experiment.for_method(label, seed=seed, track=()), values)
    return Cell(experiment=experiment, data=one.name, data_digest=one.digest, label=label)


def _tuning(found: list[dict[str, Any]], trials: int, seeds: Sequence[int]) -> dict[str, Any] | None:
    if not trials:
        return None
    note = (
        "Every method had the same number of trials on every data set, judged by the validation criterion of the best "
        "round with a seed that is not compared. Test data were not read."
    )
    return {"trials": trials, "seed": tuning_seed(seeds), "note": note, "searches": found}


def _federation(sets: Sequence[DataSet], facts: dict[str, Any]) -> dict[str, Any]:
    if len(sets) == 1:
        return facts
    synthetic = any(one.facts["synthetic"] for one in sets)
    return {"name": ", ".join(one.name for one in sets), "synthetic": synthetic, "classes": [], "digest": None}


def _command(
    methods: Sequence[str], seeds: Sequence[int], sets: int, trials: int, controls: bool, target: float | None
) -> str:
    data = " ".join(["DATA", *(f"DATA{n}" for n in range(2, sets + 1))])
    text = f"confrere compare {data} --methods {shlex.quote(','.join(methods))} --seeds {','.join(map(str, seeds))}"
    text += f" --tune {trials}" if trials else ""
    text += "" if controls else " --no-controls"
    return text + (f" --target {target}" if target is not None else "")

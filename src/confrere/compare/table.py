"""The rows of a comparison: scores with intervals, the worst hospital, cost, and the way to a target score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from confrere.compare.grid import Grid, title, value
from confrere.method import METHODS
from confrere.metrics.bootstrap import reach


def row(grid: Grid, label: str, targets: Mapping[str, float | None]) -> dict[str, Any]:
    """Return one method's row.

    Args:
        grid: finished runs.
        label: the method.
        targets: by data set, the validation score whose price in bytes and seconds is asked.
    """
    sites, held_out = grid.sites(), grid.sites(held_out=True)
    found: dict[str, Any] = {"name": label, "title": title(label), "seeds": list(grid.seeds)}
    for metric in grid.task["measures"]:
        found[metric] = over_seeds(_scores(grid, label, sites, "personalised", metric))
    found["general"] = over_seeds(_scores(grid, label, sites, "general", grid.headline))
    found["held_out"] = over_seeds(_scores(grid, label, held_out, "general", grid.headline))
    found["sites"] = {
        grid.site_name(data, site): interval(
            [v for r in grid.results(label, data) if (v := value(r, site, "personalised", grid.headline)) is not None]
        )
        for data, site in sites
    }
    known = {name: cell["mean"] for name, cell in found["sites"].items() if cell["mean"] is not None}
    found["worst_site"] = min(known, key=lambda name: float(known[name])) if known else None
    return found | _cost(grid, label) | {"target": _to_target(grid, label, targets)}


def targets(grid: Grid, given: float | None) -> dict[str, float | None]:
    """Return the target score of each data set: the given one, or local-only's mean validation score.

    The latter is of the rounds local-only kept, averaged over seeds; None without local-only among the methods.
    """
    if given is not None or "local" not in grid.labels:
        return dict.fromkeys(grid.sets, given)
    found: dict[str, float | None] = {}
    for data in grid.sets:
        scores = []
        for result, events in zip(grid.results("local", data), grid.events("local", data), strict=True):
            scores += [e["mean"] for e in _judged(events) if e["round"] == result["round"]]
        found[data] = float(np.mean(scores)) if scores else None
    return found


def way_to(events: Sequence[Mapping[str, Any]], target: float, sites: Sequence[str]) -> dict[str, float] | None:
    """Return bytes and seconds until the first judged round whose validation score reaches ``target``, or None.

    Bytes count what every site of ``sites`` sent and received; seconds are of the rounds, not of loading.
    """
    reached = min((e["round"] for e in _judged(events) if e["mean"] >= target), default=None)
    if reached is None:
        return None
    rounds = [e for e in events if e["event"] == "round" and e["round"] <= reached]
    moved = [part for e in rounds for site, part in e["sites"].items() if site in sites]
    total = sum(part["sent_bytes"] + part["received_bytes"] for part in moved)
    return {"round": reached, "bytes": float(total), "seconds": float(sum(e["seconds"] for e in rounds))}


def over_seeds(per_seed: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Return mean over sites, then mean and 95 % t-interval over seeds; the same for the worst site."""
    if not per_seed or not all(len(values) for values in per_seed):
        return None
    mean, worst = (interval([float(f(v)) for v in per_seed]) for f in (np.mean, np.min))
    return {**mean, "worst": worst["mean"], "worst_low": worst["low"], "worst_high": worst["high"]}


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of scores in 0..1 and its 95 % Student t interval, cut to 0..1; none from a single value."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = reach(values)
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def scores_of(grid: Grid) -> list[dict[str, Any]]:
    """Return one record for every method, data set, seed and site: the numbers all tables are made of."""
    found = []
    for label in grid.labels:
        for data, site in grid.sites():
            for seed, result in zip(grid.seeds, grid.results(label, data), strict=True):
                record: dict[str, Any] = {"method": label, "data": data, "site": site, "seed": seed}
                found.append(record | {key: value(result, site, "personalised", key) for key in grid.task["measures"]})
    return found


def _scores(grid: Grid, label: str, sites: Sequence[tuple[str, str]], model: str, metric: str) -> list[list[float]]:
    """Return the defined scores of each seed over all sites of all data sets."""
    found: list[list[float]] = [[] for _ in grid.seeds]
    for data, site in sites:
        for values, result in zip(found, grid.results(label, data), strict=True):
            score = value(result, site, model, metric)
            if score is not None:
                values.append(score)
    return found


def _cost(grid: Grid, label: str) -> dict[str, Any]:
    results = [result for data in grid.sets for result in grid.results(label, data)]
    totals = [sum(e["sent_bytes"] + e["received_bytes"] for e in r["sites"].values()) for r in results]
    moves = not METHODS[label.split(":")[0]].pools  # pooling moves images, which no journal counts
    return {
        "rounds_chosen": [r["round"] for r in results],
        "seconds": float(np.mean([r["seconds"] for r in results])),
        "bytes": float(np.mean(totals)) if moves else None,
        "bytes_per_round": sum(totals) / sum(r["rounds"] for r in results),
        "overlap_after": _overlap(grid, label),
    }


def _to_target(grid: Grid, label: str, targets: Mapping[str, float | None]) -> dict[str, Any] | None:
    """Return the price of the target over all runs: means over the runs that reached it, and how many did."""
    if any(target is None for target in targets.values()):
        return None
    ways = [
        way_to(events, float(targets[data] or 0.0), list(result["sites"]))
        for data in grid.sets
        for events, result in zip(grid.events(label, data), grid.results(label, data), strict=True)
    ]
    there = [way for way in ways if way is not None]
    moves = not METHODS[label.split(":")[0]].pools
    means = {
        key: float(np.mean([way[key] for way in there])) if there else None for key in ("round", "bytes", "seconds")
    }
    return {**means, "bytes": means["bytes"] if moves else None, "reached": len(there), "runs": len(ways)}


def _judged(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [e for e in events if e["event"] == "evaluation" and e["mean"] is not None]


def _overlap(grid: Grid, label: str) -> dict[str, float] | None:
    """Return the mean overlap of the adapters after averaging in the chosen round, over sites, seeds and data sets."""
    found: dict[str, list[float]] = {}
    for data in grid.sets:
        for events, result in zip(grid.events(label, data), grid.results(label, data), strict=True):
            for event in events:
                if event["event"] == "round" and event["round"] == result["round"]:
                    for measures in (event["diagnostics"]["overlap_after"] or {}).values():
                        for key, known in measures.items():
                            if known is not None:
                                found.setdefault(key, []).append(known)
    return {key: float(np.mean(values)) for key, values in found.items()} or None

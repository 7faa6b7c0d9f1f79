"""Compute everything the report of a comparison of methods shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confrere.report.reading import Json, as_dict, as_list, need, number, read_json
from confrere.report.summarize import gain_limit, interval, outcome
from confrere.report.task import LEFT_OUT, METRICS, task_of

CONTROLS = ("local", "pooled")
SURE = 0.05
MANY = 15
"""More methods than this do not fit into a critical-difference diagram: their table draws it, line by line."""


def summarize_comparison(directory: Path) -> Json:
    """Return what the report of ``confrere compare`` shows; methods by mean score, the highest first.

    Args:
        directory: holds ``comparison.json``.

    Raises:
        RunError: ``comparison.json`` or one of its required keys is missing or damaged.
    """
    given = read_json(directory, "comparison.json")
    task = task_of(given, "comparison.json")
    task["measures"] = [measure for measure in task["measures"] if measure["key"] not in LEFT_OUT]
    headline, measured = task["headline"], [measure["key"] for measure in task["measures"]]
    methods = [_method(one, measured) for one in need(given, "methods", "comparison.json")]
    methods.sort(key=lambda method: _order(method[headline]["value"]))
    pairs, local, overall = ([_pair(as_dict(p)) for p in as_list(given.get(key))] for key in PAIRS)
    sites = list(dict.fromkeys(site for method in methods for site in method["sites"]))
    titles = {method["name"]: method["title"] for method in methods}
    federation = as_dict(given.get("federation"))
    keys = ("seeds", "command", "machine", "date", "intervals", "recommendation", "targets")
    return {
        "kind": "comparison",
        "format": 2,
        "title": _title([method["name"] for method in methods]),
        "task": task,
        "federation": {key: federation.get(key) for key in ("name", "synthetic", "classes", "digest")},
        "data": [
            {key: as_dict(one).get(key) for key in ("name", "digest", "own")} for one in as_list(given.get("data"))
        ],
        "experiment": _without_path(given.get("experiment")),
        "methods": methods,
        "axis": _axis([method[headline] for method in methods]),
        "sites": sites,
        "pairs": pairs,
        "local_pairs": local,
        "overall": overall,
        "limit": gain_limit([*pairs, *local]),
        "overall_limit": gain_limit([gain for method in methods for gain in method["gains"].values()]),
        "titles": titles,
        "heat": _heat(methods, sites, local),
        "front": _front(methods, headline),
        "ranks": _ranks(as_dict(given.get("ranks")), titles),
        "scores": as_list(given.get("scores")),
        "tuning": _tuning(as_dict(given.get("tuning")), list(titles)),
        **{key: given.get(key) for key in keys},
    }


def _title(names: Sequence[str]) -> str:
    """Return how many methods and how many controls are compared; a control with another setting is one, too."""
    controls = sum(name.split(":")[0] in CONTROLS for name in names)
    counts = [(len(names) - controls, "method"), (controls, "control")]
    return " and ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count) + " compared"


def _without_path(experiment: Any) -> str | None:
    """Return the experiment's TOML without where the data lay."""
    lines = experiment.splitlines(keepends=True) if isinstance(experiment, str) else []
    return "".join(line for line in lines if not line.startswith("path = ")) or None


PAIRS = ("pairs", "local_pairs", "overall")


def _method(given: Json, measured: Sequence[str]) -> Json:
    headline, *others = measured
    name = need(given, "name", "comparison.json, methods")
    main = as_dict(need(given, headline, f"comparison.json, methods, {name}"))
    worst = {"value": main.get("worst"), "low": main.get("worst_low"), "high": main.get("worst_high")}
    if given.get("worst_site"):  # by its mean over seeds; without its name, the mean of every seed's lowest
        worst = as_dict(as_dict(given.get("sites")).get(given["worst_site"]))
    general: Any = given.get("general")
    target = as_dict(given.get("target"))
    gains = {key: _pair(as_dict(gain)) for key, gain in as_dict(given.get("gains")).items() if gain}
    return {
        "name": name,
        "title": str(given.get("title") or name),
        "seeds": as_list(given.get("seeds")),
        headline: interval(main),
        "worst": interval(worst),
        "worst_site": given.get("worst_site"),
        **{key: interval(given.get(key)) for key in others},
        "general": interval(as_dict(general).get(headline, general)),
        "gains": gains,
        **{key: number(given.get(key)) for key in ("bytes", "bytes_per_round", "seconds")},
        "target": {key: number(target.get(key)) for key in ("bytes", "seconds", "reached", "runs")} if target else None,
        "overlap_after": {key: number(as_dict(given.get("overlap_after")).get(key)) for key in ("A", "B", "product")},
        "sites": {site: interval(value) for site, value in as_dict(given.get("sites")).items()},
    }


def _order(score: float | None) -> float:
    return math.inf if score is None else -float(score)


def _axis(cells: Sequence[Json]) -> Json:
    """Return the ends of an axis that holds the scores of all methods and little else, in steps of 5 %."""
    ends = [cell[key] for cell in cells for key in ("low", "value", "high") if cell[key] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    high = min(1.0, max(1, math.ceil(high * 20 - 1e-9)) / 20)
    return {"low": min(math.floor(low * 20 + 1e-9) / 20, high - 0.05), "high": high}


def _tuning(given: Json, order: Sequence[str]) -> Json | None:
    """Return the searches in the order of the methods."""
    if not given:
        return None
    place = {name: number for number, name in enumerate(order)}
    searches = sorted(as_list(given.get("searches")), key=lambda one: place.get(one.get("method"), len(place)))
    return {**given, "searches": searches}


def _pair(given: Json) -> Json:
    texts = {key: given.get(key) for key in ("a", "b", "site", "sentence")}
    numbers = {key: number(given.get(key)) for key in ("gain", "low", "high", "p", "p_holm")}
    return texts | numbers | {"outcome": outcome(given)}


def _heat(methods: Sequence[Json], sites: Sequence[str], local: Sequence[Json]) -> Json | None:
    """Return per method and site the score, its difference from training alone, and whether the test shows one.

    Without local-only training the difference is from the mean of the methods at the site. ``shade`` is the
    difference as a share of the largest one, -1 to 1.
    """
    alone = next((method for method in methods if method["name"] == "local"), None)
    base: dict[str, float] = {}
    for site in sites:
        known = [v for m in methods if (v := as_dict(m["sites"].get(site)).get("value")) is not None]
        own = as_dict(alone["sites"].get(site)).get("value") if alone else None
        if own is not None or known:
            base[site] = own if own is not None else sum(known) / len(known)
    shown = {(p["a"], p["site"]) for p in local if p["p_holm"] is not None and p["p_holm"] < SURE}
    rows = []
    for method in methods:
        cells = []
        for site in sites:
            value = as_dict(method["sites"].get(site)).get("value")
            gap = None if value is None or site not in base else value - base[site]
            cells.append({"value": value, "difference": gap, "shown": (method["name"], site) in shown})
        rows.append({"title": method["title"], "cells": cells})
    largest = max(
        (abs(c["difference"]) for row in rows for c in row["cells"] if c["difference"] is not None), default=0
    )
    for cell in (cell for row in rows for cell in row["cells"]):
        cell["shade"] = cell["difference"] / largest if largest and cell["difference"] is not None else 0.0
    return {"against": "local" if alone else "mean", "rows": rows} if sites else None


def _front(methods: Sequence[Json], headline: str = METRICS[0]) -> list[str]:
    """Return the methods that no other one beats in mean score for the same or fewer bytes."""
    known = [(m["bytes"], m[headline]["value"], m["name"]) for m in methods]
    points = [point for point in known if point[0] is not None and point[1] is not None]
    return [
        name
        for size, score, name in sorted(points, key=lambda point: (point[0], -point[1]))
        if not any(s <= size and v >= score and (s < size or v > score) for s, v, _ in points)
    ]


def _ranks(given: Json, titles: dict[str, str]) -> Json | None:
    """Return the methods by mean rank with the letters of the groups they belong to."""
    if not given:
        return None
    ranks, groups = as_dict(given.get("ranks")), as_list(given.get("groups"))
    order = sorted(ranks, key=lambda name: ranks[name])
    letters = {name: "".join(_letter(i) for i, group in enumerate(groups) if name in group) for name in order}
    rows = [{"name": n, "title": titles.get(n, n), "rank": ranks[n], "letters": letters[n]} for n in order]
    bars = [[min(ranks[n] for n in group), max(ranks[n] for n in group)] for group in groups if len(group) > 1]
    keys = ("statistic", "p", "difference", "shown", "blocks", "assumption")
    half = (number(given.get("difference")) or 0.0) / 2
    for row in rows:
        row["reach"] = {"value": row["rank"], "low": row["rank"] - half, "high": row["rank"] + half}
    axis = {"low": min(row["reach"]["low"] for row in rows), "high": max(row["reach"]["high"] for row in rows)}
    return {"rows": rows, "bars": bars, "axis": axis, "many": len(rows) > MANY, **{k: given.get(k) for k in keys}}


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f"{chr(ord('a') + index % 26)}{index // 26}"

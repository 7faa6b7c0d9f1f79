"""What the numbers are evidence for: paired tests over patients and seeds, corrected for their number, and ranks.

Two families of tests, each corrected by Holm's method within itself:

- overall: every method against every other one, the mean gain over all hospitals. Any claim about the method that
  happens to be best is covered, as all pairs are.
- by hospital: the first method against the others, and every method against training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from confrere.compare.grid import Grid, title, value
from confrere.metrics.mean_gain import SiteScores, mean_gain, resample_site
from confrere.metrics.paired import holm, signed, spoken, verdict
from confrere.metrics.ranks import ASSUMPTION, rank_test
from confrere.seeds import numpy_generator
from confrere.verdicts import site_gain

SURE = 0.05
RESAMPLES = (2000, 20_000)
Pair = dict[str, Any]


def resamples(tests: int) -> int:
    """Return how many resamples let a clear difference stay below 0.05 after correction for ``tests`` tests."""
    return min(RESAMPLES[1], max(RESAMPLES[0], 100 * tests))


def overall(grid: Grid, sites: Sequence[SiteScores]) -> list[Pair]:
    """Return the mean gain over all hospitals for every pair of methods, told after correction.

    Args:
        grid: finished runs. In a pair of a method and a control, the control is ``b``.
        sites: what :func:`site_scores` returned.
    """
    order = [label for label in grid.labels if label not in ("pooled", "local")]
    order += [label for label in ("pooled", "local") if label in grid.labels]
    gains = [{"a": a, "b": b, **mean_gain(sites, a, b), "metric": grid.headline} for a, b in combinations(order, 2)]
    return [{**one, "sentence": sentence(one)} for one in corrected(gains)]


def site_scores(grid: Grid) -> list[SiteScores]:
    """Return the resampled scores of every hospital whose test images all methods and seeds were examined on.

    Data sets of the same files draw the same patients: a mean over them then varies as one over the same people does.
    """
    count = resamples(len(grid.labels) * (len(grid.labels) - 1) // 2)
    found = []
    for data, site in grid.sites():
        runs = {label: grid.predictions(label, data, site) for label in grid.labels}
        known = {label: [p for p in by_seed if p is not None and len(p[1])] for label, by_seed in runs.items()}
        if all(len(by_seed) == len(grid.seeds) for by_seed in known.values()):
            rng = numpy_generator(0, "mean gain", grid.origin.get(data, data), site)
            scores = resample_site(known, generator=rng, resamples=count)
            if scores is not None:
                found.append(scores)
    return found


def by_hospital(grid: Grid) -> tuple[list[Pair], list[Pair]]:
    """Return the first method against the others, and every method against training alone, at every hospital.

    The first against training alone stands in both lists and is tested once.
    """
    first, *others = grid.labels
    against = [(first, other) for other in others]
    local = [(label, "local") for label in grid.labels if label != "local"] if "local" in grid.labels else []
    wanted = list(dict.fromkeys([*against, *local]))
    count = resamples(len(wanted) * len(grid.sites()))
    found = [
        {"a": a, "b": b, "site": grid.site_name(data, site), **gain}
        for a, b in wanted
        for data, site in grid.sites()
        if (gain := site_gain(grid.runs(a, data), grid.runs(b, data), site, resamples=count, metric=grid.headline))
        is not None
    ]
    told = adjusted(found)
    return [[one for one in told if (one["a"], one["b"]) in chosen] for chosen in (against, local)]  # type: ignore[return-value]


def corrected(pairs: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Return the pairs with Holm's p-value; interval and adjusted p tell one story."""
    found = []
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        one = {**pair, "p_holm": p}
        if p is not None and p >= SURE:
            one |= {"low": min(pair["low"], 0.0), "high": max(pair["high"], 0.0)}
        if one["low"] is not None:  # two seeds may reach beyond what a difference of shares can be
            one |= {"low": max(-1.0, one["low"]), "high": min(1.0, one["high"])}
        found.append(one)
    return found


def adjusted(pairs: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Return the pairs of hospitals with Holm's p-value and a sentence that follows it."""
    told = corrected(pairs)
    return [{**one, "sentence": verdict(one["site"], one, title(one["b"]), subject=title(one["a"]))} for one in told]


def outcome(pair: Mapping[str, Any]) -> int:
    """Return 1 where the corrected test shows that A is better than B, -1 where worse, 0 where it shows nothing."""
    p = pair["p_holm"]
    if p is None or p >= SURE or pair["low"] is None:
        return 0
    return 1 if pair["low"] > 0 else -1 if pair["high"] < 0 else 0


def between(pairs: Sequence[Pair], a: str, b: str) -> Pair | None:
    """Return the pair (A, B), turned round where it stands as (B, A); None if there is none."""
    for pair in pairs:
        if (pair["a"], pair["b"]) == (a, b):
            return pair
        if (pair["a"], pair["b"]) == (b, a):
            negative = {key: None if pair[key] is None else -pair[key] for key in ("gain", "low", "high")}
            turned = {"gain": negative["gain"], "low": negative["high"], "high": negative["low"]}
            one = {**pair, "a": a, "b": b, **turned}
            return {**one, "sentence": sentence(one)}
    return None


def sentence(pair: Mapping[str, Any]) -> str:
    """Return an overall pair in words that claim no more than its corrected test."""
    a, b = title(pair["a"]), title(pair["b"])
    if pair["gain"] is None or pair["low"] is None:
        return f"{a} cannot be compared with {b}: {pair['note']}."
    said = {1: "is better than", -1: "is worse than", 0: "cannot be told apart from"}[outcome(pair)]
    return f"{a} {said} {b}: {numbers(pair)}."


def numbers(pair: Mapping[str, Any]) -> str:
    """Return ``+3.1 points of balanced accuracy (95 % interval 0.4 to 5.9, adjusted p 0.012)``."""
    low, high = signed(100 * pair["low"]), signed(100 * pair["high"])
    p = pair["p_holm"]
    tested = "" if p is None else f", adjusted p {'< 0.001' if p < 0.001 else f'{p:.3f}'}"
    gain = signed(100 * pair["gain"])
    measure = spoken(pair.get("metric", "balanced_accuracy"))
    return f"{gain} points of {measure} (95 % interval {low} to {high}{tested})"


def ranking(grid: Grid) -> dict[str, Any] | None:
    """Return the ranks of the methods over (data set, site, seed) blocks; None with fewer than three methods."""
    blocks = []
    for data, site in grid.sites():
        for number in range(len(grid.seeds)):
            scores = [
                value(grid.results(label, data)[number], site, "personalised", grid.headline) for label in grid.labels
            ]
            if all(score is not None for score in scores):
                blocks.append(scores)
    if len(grid.labels) < 3 or len(blocks) < 2:
        return None
    found = rank_test(np.array(blocks, dtype=np.float64))
    named = [[grid.labels[i] for i in group] for group in found["groups"]]
    ranks = dict(zip(grid.labels, found["ranks"], strict=True))
    return {**found, "ranks": ranks, "groups": named, "assumption": ASSUMPTION}

"""A recommendation in plain words, and the evidence for every word of it.

It claims a difference only where the corrected paired test over all hospitals shows one (``evidence.outcome``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from confrere.compare.evidence import Pair, between, numbers, outcome
from confrere.compare.grid import title
from confrere.metrics.paired import spoken

CONTROLS = ("local", "pooled")
NAMED = 5


def recommend(
    rows: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    local_pairs: Sequence[Pair],
    *,
    metric: str = "balanced_accuracy",
) -> dict[str, Any]:
    """Return ``headline``, ``winner``, ``within_noise`` and ``sentences``, each with the pairs it rests on.

    Args:
        rows: of the table.
        pairs: overall, corrected.
        local_pairs: every method against training alone, by hospital.
        metric: the headline of the table.
    """
    scored = [r for r in rows if not _control(r["name"]) and r[metric]]
    if not scored:
        return {"headline": "No method was examined.", "winner": None, "within_noise": [], "sentences": []}
    order = sorted(scored, key=lambda r: -float(r[metric]["mean"]))
    best, name = order[0], order[0]["name"]
    others = {r["name"]: between(pairs, name, r["name"]) for r in rows if r["name"] != name}
    rivals = {other: pair for other, pair in others.items() if not _control(other)}
    noise = [other for other, pair in rivals.items() if pair is None or outcome(pair) == 0]
    said = [_best(best, len(scored), len(rows), metric), _beaten(name, rivals), _noise(name, noise, rivals)]
    said += [_joining(name, others["local"]) if "local" in others else _unknown(), _others(name, scored, pairs)]
    said += [_by_hospital(name, local_pairs), _pooled(name, others.get("pooled")), _cost(best, noise, rows)]
    joins = None if (local := others.get("local")) is None else outcome(local)
    sentences = [one for one in said if one is not None]
    if len(best["seeds"]) == 1:
        sentences.append(_say("One seed: chance between training runs is in none of these intervals."))
    return {
        "headline": _headline(name, noise, joins, _joined(order, pairs)),
        "winner": name,
        "within_noise": noise,
        "sentences": sentences,
    }


def _control(label: str) -> bool:
    """Return whether a label is of a control, also of one with another setting (``local:adapter.rank=4``)."""
    return label.split(":")[0] in CONTROLS


def _say(text: str, *evidence: Pair | None) -> dict[str, Any]:
    kept = ("a", "b", "site", "gain", "low", "high", "p", "p_holm")
    pairs = [{key: pair[key] for key in kept if key in pair} for pair in evidence if pair is not None]
    return {"text": text, "evidence": pairs}


def _headline(name: str, noise: Sequence[str], joins: int | None, joined: Sequence[Pair]) -> str:
    if joins is None:
        return f"Highest mean score: {title(name)}. Whether joining beats training alone was not tested."
    if joins > 0:
        others = (
            f" {len(noise)} other method{'s are' if len(noise) > 1 else ' is'} within noise of it." if noise else ""
        )
        return f"Join, with {title(name)}: it beats training alone on average over the hospitals.{others}"
    if joined:
        return (
            f"Join, with {title(joined[0]['a'])}: it is shown to beat training alone on average over the hospitals. "
            f"{title(name)} has a higher mean, but its difference from training alone is not shown."
        )
    if joins < 0:
        return (
            f"Train alone: even {title(name)}, the highest of the methods, is below it on average over the hospitals."
        )
    return (
        f"No evidence that joining beats training alone: {title(name)} has the highest mean of the methods, but its "
        "difference from training alone is within noise."
    )


def _best(best: Mapping[str, Any], count: int, among: int, metric: str) -> dict[str, Any]:
    """Say how the best of ``count`` methods scores, in a table of ``among`` rows with those of the controls."""
    cell, site = best[metric], best["worst_site"]
    ends = "" if cell["low"] is None else f" (95 % interval {100 * cell['low']:.1f} to {100 * cell['high']:.1f})"
    worst = f"; its worst hospital is {site} with {100 * best['sites'][site]['mean']:.1f} %" if site else ""
    mean, beside = f"{100 * cell['mean']:.1f} %{ends}{worst}.", " beside the controls" * (among > count)
    if count == 1:
        return _say(f"{title(best['name'])}, the only method{beside}, has a mean {spoken(metric)} of {mean}")
    first = "higher" if count == 2 else "highest"
    return _say(
        f"Of the {count} methods{beside}, {title(best['name'])} has the {first} mean {spoken(metric)}: {mean} "
        f"The {first} of {count} is a little too high by selection."
    )


def _beaten(name: str, rivals: Mapping[str, Pair | None]) -> dict[str, Any] | None:
    beaten = [pair for pair in rivals.values() if pair is not None and outcome(pair) > 0]
    worse = [pair for pair in rivals.values() if pair is not None and outcome(pair) < 0]
    parts = []
    if beaten:
        parts.append("beats " + _some([f"{title(pair['b'])} by {numbers(pair)}" for pair in _nearest(beaten)]))
    if worse:  # the means of all hospitals and of those with enough patients may be ordered differently
        parts.append("is below " + _some([f"{title(pair['b'])} by {numbers(pair)}" for pair in _nearest(worse)]))
    return _say(f"{title(name)} {' and '.join(parts)}.", *beaten, *worse) if parts else None


def _noise(name: str, noise: Sequence[str], rivals: Mapping[str, Pair | None]) -> dict[str, Any] | None:
    if not rivals:
        return None
    if not noise:
        return _say("No other method is within noise of it.")
    pairs = [pair for other in noise if (pair := rivals[other]) is not None]
    known = _nearest([pair for pair in pairs if pair["low"] is not None])
    told = [f"{title(pair['b'])}: {numbers(pair)}" for pair in known]
    told += [title(other) for other in noise if other not in {pair["b"] for pair in known}]
    return _say(f"Within noise of {title(name)}, so that this comparison does not order them: {_some(told)}.", *pairs)


def _nearest(pairs: Sequence[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: abs(float(pair["gain"])))


def _some(parts: Sequence[str]) -> str:
    """Return the first of many parts and how many more there are; the page's tables hold them all."""
    more = len(parts) - NAMED
    return "; ".join(parts[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _joining(name: str, pair: Pair | None) -> dict[str, Any]:
    if pair is None or pair["low"] is None:
        return _say("Whether joining beats training alone cannot be said: too few test patients.", pair)
    told = {
        1: f"Joining with {title(name)} beats training alone: {numbers(pair)}.",
        -1: f"Joining with {title(name)} is worse than training alone: {numbers(pair)}.",
        0: f"There is no evidence that joining with {title(name)} beats training alone: {numbers(pair)}.",
    }
    return _say(told[outcome(pair)], pair)


def _joined(order: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> list[Pair]:
    """Return the methods that are shown to beat training alone, in their order."""
    against = [between(pairs, r["name"], "local") for r in order]
    return [pair for pair in against if pair is not None and outcome(pair) > 0]


def _others(name: str, scored: Sequence[Mapping[str, Any]], pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Say which other methods are shown to differ from training alone."""
    against = [between(pairs, r["name"], "local") for r in scored if r["name"] != name]
    known = [pair for pair in against if pair is not None]
    better, worse = ([pair for pair in known if outcome(pair) == sign] for sign in (1, -1))
    if not known:
        return None
    parts = [
        f"{word} training alone: {_some([title(pair['a']) for pair in found])}"
        for word, found in (("better than", better), ("worse than", worse))
        if found
    ]
    if not parts:
        return _say("No other method is shown to differ from training alone either way.", *known)
    return _say(f"Of the other methods, shown to be {'; '.join(parts)}.", *better, *worse)


def _unknown() -> dict[str, Any]:
    return _say("Training alone is not among the methods, so whether joining pays is not known.")


def _by_hospital(name: str, local_pairs: Sequence[Pair]) -> dict[str, Any] | None:
    own = [pair for pair in local_pairs if pair["a"] == name]
    if not own:
        return None
    paid = [pair for pair in own if outcome(pair) > 0]
    hurt = [pair for pair in own if outcome(pair) < 0]
    where = f" ({', '.join(pair['site'] for pair in hurt)})" if hurt else ""
    return _say(
        f"By hospital, {title(name)} is shown to be better than training alone at {len(paid)} of {len(own)}, worse at "
        f"{len(hurt)}{where}, and neither at {len(own) - len(paid) - len(hurt)}.",
        *own,
    )


def _pooled(name: str, pair: Pair | None) -> dict[str, Any] | None:
    if pair is None or pair["low"] is None:
        return None
    told = {
        1: f"It is better than pooling all images in one place: {numbers(pair)}.",
        -1: f"It is below pooling all images in one place: {numbers(pair)}.",
        0: f"It cannot be told apart from pooling all images in one place: {numbers(pair)}.",
    }
    return _say(told[outcome(pair)], pair)


def _cost(best: Mapping[str, Any], noise: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Name the method that moves least among those not told apart from the best."""
    same = [r for r in rows if r["name"] in {best["name"], *noise} and r["bytes"] is not None]
    if len(same) < 2 or not best["bytes"]:
        return None
    least = min(same, key=lambda r: float(r["bytes"]))
    if least["bytes"] >= 0.95 * best["bytes"]:
        return None
    share = 100 * least["bytes"] / best["bytes"]
    return _say(
        f"Among {title(best['name'])} and those within noise of it, {title(least['name'])} moves least: "
        f"{share:.0f} % of its bytes in a run."
    )

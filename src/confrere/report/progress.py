"""What happened round by round: curves, geometry of the adapters, traffic, failures."""

from __future__ import annotations

from typing import Any

from confrere.report.reading import Json, as_dict, as_list, number

MEASURES = ("A", "B", "product", "outputs")


def sections(events: list[Json], results: Json) -> Json:
    """Return the parts of a summary that come from the events of a run.

    Args:
        events: the lines of ``events.jsonl``, oldest first.
        results: the content of ``results.json``; its totals of bytes win over sums of the events.
    """
    rounds = [event for event in events if event["event"] == "round"]
    stops = [event for event in events if event["event"] == "stop"]
    return {
        "curves": _curves(events, number(results.get("round"))),
        "separation": _separation(rounds),
        "aggregation_error": _aggregation_error(rounds),
        "similarity": _similarity(rounds),
        "traffic": _traffic(rounds, as_dict(results.get("sites"))),
        "failures": [
            {key: event.get(key) for key in ("round", "site", "reason")}
            for event in events
            if event["event"] == "failure"
        ],
        "stop": {key: stops[-1].get(key) for key in ("round", "reason")} if stops else None,
    }


def _curves(events: list[Json], chosen: float | None) -> Json | None:
    scores = [event for event in events if event["event"] == "evaluation" and event.get("split", "val") == "val"]
    sites: dict[str, list[list[float]]] = {}
    mean: list[list[float]] = []
    for event in scores:
        for site, value in as_dict(event.get("sites")).items():
            _append(sites.setdefault(site, []), event, value)
        _append(mean, event, event.get("mean"))
    sites = {site: points for site, points in sites.items() if points}
    return {"sites": sites, "mean": mean, "chosen": chosen} if sites else None


def _append(points: list[list[float]], event: Json, value: Any) -> None:
    at, height = number(event.get("round")), number(value)
    if at is not None and height is not None:
        points.append([at, height])


def _separation(rounds: list[Json]) -> Json | None:
    """Return, per measure, each site's overlap of general and personal adapter before and after averaging."""
    found: Json = {}
    for measure in MEASURES:
        curves: Json = {"before": {}, "after": {}}
        for event in rounds:
            for moment, lines in curves.items():
                diagnostics = as_dict(as_dict(event.get("diagnostics")).get(f"overlap_{moment}"))
                for site, values in diagnostics.items():
                    _append(lines.setdefault(site, []), event, as_dict(values).get(measure))
        lines = {moment: {k: v for k, v in sites.items() if v} for moment, sites in curves.items()}
        if lines["before"] or lines["after"]:
            found[measure] = lines
    return found or None


def _aggregation_error(rounds: list[Json]) -> list[list[float]] | None:
    points: list[list[float]] = []
    for event in rounds:
        _append(points, event, as_dict(event.get("diagnostics")).get("aggregation_error"))
    return points or None


def _similarity(rounds: list[Json]) -> Json | None:
    """Return the last similarity matrix of the run, with its round."""
    for event in reversed(rounds):
        given = as_dict(as_dict(event.get("diagnostics")).get("similarity"))
        if len(as_list(given.get("sites"))) > 1:
            matrix = [[number(value) for value in row] for row in as_list(given.get("matrix"))]
            return {"round": event.get("round"), "sites": given["sites"], "matrix": matrix}
    return None


def _traffic(rounds: list[Json], results: Json) -> Json | None:
    names = dict.fromkeys([*results, *(site for event in rounds for site in as_dict(event.get("sites")))])
    rows = [_traffic_row(name, rounds, as_dict(results.get(name))) for name in names]
    rows = [row for row in rows if row["rounds"] or row["sent_bytes"] is not None]
    if not rows:
        return None
    total = {key: _total(row[key] for row in rows) for key in ("sent_bytes", "received_bytes", "seconds")}
    return {
        "sites": rows,
        "total": total,
        "seconds": _total(number(event.get("seconds")) for event in rounds),
    }


def _traffic_row(name: str, rounds: list[Json], result: Json) -> Json:
    parts = [as_dict(as_dict(event.get("sites")).get(name)) for event in rounds]
    parts = [part for part in parts if part]
    row: Json = {
        "name": name,
        "rounds": len(parts),
        "seconds": _total(number(p.get("seconds")) for p in parts),
    }
    for key in ("sent_bytes", "received_bytes"):
        given = number(result.get(key))
        row[key] = given if given is not None else _total(number(part.get(key)) for part in parts)
    row["examples"] = max((n for p in parts if (n := number(p.get("examples"))) is not None), default=None)
    return row


def _total(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None

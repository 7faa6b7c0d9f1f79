"""Compute everything the report of a comparison of methods shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from confrere.report.reading import Json, as_dict, as_list, need, number, read_json
from confrere.report.summarize import gain_limit, interval, outcome


def summarize_comparison(directory: Path) -> Json:
    """Return what the report of ``confrere compare`` shows.

    Args:
        directory: holds ``comparison.json``.

    Raises:
        RunError: ``comparison.json`` or one of its required keys is missing or damaged.
    """
    given = read_json(directory, "comparison.json")
    methods = [_method(method) for method in need(given, "methods", "comparison.json")]
    pairs = [_pair(as_dict(pair)) for pair in as_list(given.get("pairs"))]
    federation = as_dict(given.get("federation"))
    keys = ("seeds", "command", "machine", "date")
    return {
        "kind": "comparison",
        "format": 1,
        "title": f"{len(methods)} methods compared",
        "federation": {key: federation.get(key) for key in ("name", "synthetic", "classes", "digest")},
        "methods": methods,
        "sites": list(dict.fromkeys(site for method in methods for site in method["sites"])),
        "pairs": pairs,
        "limit": gain_limit(pairs),
        "titles": {method["name"]: method["title"] for method in methods},
        **{key: given.get(key) for key in keys},
    }


def _method(given: Json) -> Json:
    name = need(given, "name", "comparison.json, methods")
    main = as_dict(need(given, "balanced_accuracy", f"comparison.json, methods, {name}"))
    worst = {"value": main.get("worst"), "low": main.get("worst_low"), "high": main.get("worst_high")}
    general: Any = given.get("general")
    return {
        "name": name,
        "title": str(given.get("title") or name),
        "seeds": as_list(given.get("seeds")),
        "balanced_accuracy": interval(main),
        "worst": interval(worst),
        **{key: interval(given.get(key)) for key in ("auroc", "f1", "ece")},
        "general": interval(as_dict(general).get("balanced_accuracy", general)),
        "bytes_per_round": number(given.get("bytes_per_round")),
        "seconds": number(given.get("seconds")),
        "overlap_after": {key: number(as_dict(given.get("overlap_after")).get(key)) for key in ("A", "B", "product")},
        "sites": {site: interval(value) for site, value in as_dict(given.get("sites")).items()},
    }


def _pair(given: Json) -> Json:
    texts = {key: given.get(key) for key in ("a", "b", "site", "sentence")}
    numbers = {key: number(given.get(key)) for key in ("gain", "low", "high", "p", "p_holm")}
    return texts | numbers | {"outcome": outcome(given)}

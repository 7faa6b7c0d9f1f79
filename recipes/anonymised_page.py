"""Turn results.json of recipes/anonymised_tables.py into its results page, in Markdown.

python recipes/anonymised_page.py RESULTS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from confrere.compare.table import interval

Found = Mapping[str, Any]
TITLES = {"adult": "UCI Adult", "diabetes": "Diabetes-130"}


def spread(found: list[Found], get: Callable[[Found], float | None]) -> str:
    """Return ``.861 (.850 to .872)`` over seeds, or ``-`` where a seed lacks it."""
    values = []
    for one in found:
        try:
            value = get(one)
        except (KeyError, TypeError):
            value = None
        if value is None:
            return "-"
        values.append(value)
    if not values:
        return "-"
    if all(isinstance(value, int) for value in values):
        return f"{min(values)}"  # a count: the least of all seeds
    over = interval(values)
    shown = f"{over['mean']:.3f}"
    return f"{shown} ({over['low']:.3f} to {over['high']:.3f})" if over["low"] is not None else shown


def title(arm: str) -> str:
    """Return what an arm is called."""
    kind, _, value = arm.partition("-")
    names = {"raw": "raw tables", "k": f"k = {value}", "noisy": f"noisy counts, epsilon {value}"}
    return names.get(kind, f"noisy gradients, epsilon {value}")


def of(*keys: str) -> Callable[[Found], float | None]:
    """Return what reads a nested key."""

    def get(one: Found) -> float | None:
        value: Any = one
        for key in keys:
            value = value[key]
        return value  # type: ignore[no-any-return]

    return get


def over_sites(key: str) -> Callable[[Found], float]:
    """Return the mean over sites weighted by their rows."""
    return lambda one: float(
        np.average([s[key] for s in one["sites"].values()], weights=[s["rows"] for s in one["sites"].values()])
    )


def worst_site(key: str, pick: Callable[[list[float]], float]) -> Callable[[Found], float]:
    """Return the least or largest of all sites."""
    return lambda one: pick([s[key] for s in one["sites"].values() if s[key] is not None])


def table(arms: Mapping[str, list[Found]], columns: Mapping[str, Callable[[Found], float | None]]) -> list[str]:
    """Return a table of arms by columns; arms without any of them are left out."""
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm, found in arms.items():
        cells = [spread(found, get) for get in columns.values()]
        if set(cells) != {"-"}:
            lines.append(f"| {title(arm)} | " + " | ".join(cells) + " |")
    return lines


def section(name: str, arms: Mapping[str, list[Found]]) -> list[str]:
    """Return the tables of one data set."""
    frame = {arm.removeprefix("mlp:"): found for arm, found in arms.items() if arm.startswith("mlp:")}
    arms = {arm: found for arm, found in arms.items() if not arm.startswith("mlp:")}
    only_k = {arm: found for arm, found in arms.items() if arm.startswith("k-")}
    scores = {
        "AUC": of("auc_mapped"),
        "accuracy": of("accuracy_mapped"),
        "members told": of("told"),
        "its control": of("told_control"),
    }
    shown = {"box": of("auc_mapped"), "Mahalanobis": of("auc_mahalanobis"), "in the clear": of("auc_raw")}
    lost = {
        "GCP of identifiers": over_sites("identifiers"),
        "loss of items": over_sites("items"),
        "smallest class": worst_site("smallest_class", min),
        "smallest item set": worst_site("smallest_support", min),
        "l": worst_site("l", min),
        "t": worst_site("t", max),
    }
    in_table = {
        "anonymised table": of("membership", "anonymised"),
        "control: raw table": of("membership", "raw"),
        "control: strangers": of("membership", "strangers"),
    }
    ways = ("both", "alone", "stranger")
    said = {"pointed": "right row", "below_k": "among fewer than k", "told": "target told"}
    both = {f"{text}, {way}": of("intersection", way, key) for key, text in said.items() for way in ways}
    lines = [
        f"## {TITLES[name]}",
        "",
        "Logistic regression, federated. New records as each arm shows them (k: smallest ",
    ]
    lines[-1] += (
        "box of the union). Members told: area under the curve of telling training records from test records by "
    )
    lines[-1] += "their loss, 0.5 is chance; its control takes validation records for members."
    lines += ["", *table(arms, scores), ""]
    if any(frame.values()):
        lines += ["The frame's perceptron (`mlp`, `fedit`) on the same tables:", "", *table(frame, scores), ""]
    lines += ["How test records are shown to a model of generalised tables (AUC, logistic):"]
    lines += [
        "",
        *table(only_k, shown),
        "",
        "What was lost (0 to 1, mean over records), and what was counted (the least of all sites and seeds):",
        "",
    ]
    lines += [*table(only_k, lost), "", "Members of the middle site's table told from others by the table alone (area "]
    lines[-1] += "under the curve):"
    lines += [
        "",
        *table(only_k, in_table),
        "",
        "Intersection of two sites' tables that share a fifth of one's units:",
        "",
    ]
    return [*lines, *table(only_k, both), ""]


def page(summary: Mapping[str, Any], command: str) -> str:
    """Return the results page."""
    summary = json.loads(json.dumps(summary))  # plain: a missing key is a KeyError
    about, seeds = summary["machine"], summary["seeds"]
    lines = [
        "# Anonymised tables: what k and epsilon cost",
        "",
        f"Command: `{command}`. Date {summary['date']}; {about['cores']} cores of an AMD EPYC, one thread, torch "
        f"{about['torch']}, confrere {about['confrere']}. Seeds {', '.join(map(str, seeds))}: each draws other units, "
        "sites, splits and weights. Mean and 95 % Student t interval over seeds. Nothing was tuned.",
        "",
    ]
    for name, arms in summary["results"].items():
        lines += section(name, arms)
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text()), "python recipes/anonymised_tables.py DATA"))

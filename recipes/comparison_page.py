"""Turn comparison.json of `confrere compare` into the tables of a results page, in Markdown.

python recipes/comparison_page.py COMPARISON.json [COMPARISON2.json ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from confrere.compare import compare
from confrere.config import Experiment
from confrere.progress import progress
from confrere.report import write_report


def compared(experiment: Experiment, methods: str, seeds: Sequence[int], out: Path, jobs: int) -> dict[str, Any]:
    """Compare the methods named with commas and nothing else, print where the report is, and return what was found."""
    with progress(quiet=False) as notify:
        found = compare(experiment, methods.split(","), seeds, out, jobs=jobs, controls=False, notify=notify)
    print(write_report(out))
    return found


def interval(value: dict[str, Any] | None, prefix: str = "") -> str:
    """Return ``0.612 (0.590 to 0.634)``."""
    key = prefix or "mean"
    if value is None or value[key] is None:
        return "-"
    low, high = (value[f"{prefix}_{side}" if prefix else side] for side in ("low", "high"))
    return f"{value[key]:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None else "")


def gain(pair: dict[str, Any] | None) -> str:
    """Return points of balanced accuracy: ``+4.1 (-2.0 to +9.9), p 0.21``."""
    if pair is None or pair["p_holm"] is None or pair["low"] is None:
        return "-"
    difference, low, high = (100 * pair[key] for key in ("gain", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f}), p {pair['p_holm']:.2f}"


def tuned(found: dict[str, Any], name: str) -> str:
    """Return what tuning chose."""
    for one in (found["tuning"] or {"searches": []})["searches"]:
        if one["method"] == name:
            return ", ".join(
                f"{key.split('.')[-1]} {value:.2g}" if isinstance(value, float) else f"{key.split('.')[-1]} {value}"
                for key, value in one["values"].items()
            )
    return "-"


def table(found: dict[str, Any]) -> str:
    """Return one row a method, the highest mean first."""
    rows = sorted(found["methods"], key=lambda m: -(m["balanced_accuracy"] or {"mean": 0})["mean"])
    lines = [
        "| method | balanced accuracy | worst site | against training alone, points | against pooled, points | "
        "AUROC | general model alone | MB a run | chosen |",
        "|---" * 9 + "|",
    ]
    for m in rows:
        cells = (
            f"`{m['name']}`",
            interval(m["balanced_accuracy"]),
            interval(m["balanced_accuracy"], "worst"),
            gain(m["gains"].get("local")),
            gain(m["gains"].get("pooled")),
            interval(m["auroc"]),
            f"{m['general']['mean']:.3f}" if m["general"] else "-",
            f"{m['bytes'] / 1e6:.1f}" if m["bytes"] else "-",
            tuned(found, m["name"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_site(found: dict[str, Any]) -> str:
    """Return the mean balanced accuracy of every method at every site."""
    sites = sorted(found["methods"][0]["sites"])
    lines = ["| method | " + " | ".join(sites) + " |", "|---" * (len(sites) + 1) + "|"]
    for m in sorted(found["methods"], key=lambda m: -(m["balanced_accuracy"] or {"mean": 0})["mean"]):
        cells = (f"{m['sites'][s]['mean']:.3f}" if m["sites"][s]["mean"] is not None else "-" for s in sites)
        lines.append(f"| `{m['name']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(path: Path) -> str:
    """Return the tables of one comparison."""
    found = json.loads(path.read_text())
    machine, ranks = found["machine"], found["ranks"]
    parts = [
        f"{found['date']}; {machine['cores']} cores ({machine['cpu_capability']}), torch {machine['torch']}, seeds "
        f"{', '.join(map(str, found['seeds']))}. {found['recommendation']['headline']}",
        table(found),
        "By site:",
        by_site(found),
    ]
    if ranks:
        parts.append(
            f"Friedman test over blocks of data set, site and seed: p {ranks['p']:.3f}; mean ranks must differ by "
            f"{ranks['difference']:.2f} (Nemenyi). {ranks['assumption']}"
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    print("\n\n".join(page(Path(name)) for name in sys.argv[1:]))

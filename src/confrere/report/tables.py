"""A comparison's table for programs (CSV) and for papers (LaTeX)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from confrere.report.reading import Json, as_dict

CONTROLS = ("local", "pooled")
_SHORT = {"balanced_accuracy": r"Bal.\ acc."}
_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def tables(summary: Json) -> dict[str, str]:
    """Return the texts of ``comparison.csv``, ``comparison_scores.csv`` and ``comparison.tex``."""
    return {
        "comparison.csv": _csv([_record(summary, method) for method in summary["methods"]]),
        "comparison_scores.csv": _csv(summary["scores"]),
        "comparison.tex": latex(summary),
    }


def _record(summary: Json, method: Json) -> Json:
    """Return one method's line: shares in 0..1, gains as differences of shares, bytes, seconds; empty: undefined."""
    found: Json = {"method": method["name"], "title": method["title"]}
    headline, *others = (measure["key"] for measure in summary["task"]["measures"])
    for key in (headline, "worst", *others, "general"):
        found |= {key: method[key]["value"], f"{key}_low": method[key]["low"], f"{key}_high": method[key]["high"]}
    found["worst_site"] = method["worst_site"]
    for control in CONTROLS:
        gain = as_dict(method["gains"].get(control))
        for key in ("gain", "low", "high", "p_holm"):
            name = f"gain_over_{control}" if key == "gain" else f"gain_over_{control}_{key}"
            found[name] = gain.get(key)
    found |= {key: method[key] for key in ("bytes", "bytes_per_round", "seconds")}
    target = as_dict(method["target"])
    found |= {f"{key}_to_target": target.get(key) for key in ("bytes", "seconds")}
    found |= {"runs_at_target": target.get("reached"), "runs": target.get("runs")}
    rows = as_dict(summary["ranks"]).get("rows") or []
    found["mean_rank"] = next((row["rank"] for row in rows if row["name"] == method["name"]), None)
    return found


def _csv(records: Sequence[Json]) -> str:
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return text.getvalue()


def latex(summary: Json) -> str:
    r"""Return a ``tabular`` for the package booktabs; gains that the corrected test shows are bold."""
    seeds, task = summary["seeds"] or [], summary["task"]
    title = escape(task["headline_title"])
    over = "patients" if summary["intervals"] == "patients" else "seeds"
    lines = [
        r"% Needs \usepackage{booktabs}. Written by confrere compare.",
        f"% {title} in per cent, mean over {len(summary['sites'])} hospitals and {len(seeds)} seeds, with",
        f"% 95 % intervals over {over}. Gains in points with 95 % intervals over patients and seeds; bold: p < 0.05",
        "% after Holm's correction over all pairs of methods. MB: of a whole run, all hospitals.",
        r"\begin{tabular}{lccccr}",
        r"\toprule",
        rf"Method & {_SHORT.get(task['headline'], title)} & Worst hospital & Over local & Over pooled & MB \\",
        r"\midrule",
    ]
    for method in summary["methods"]:
        gains = [_gain(method["gains"].get(control)) for control in CONTROLS]
        size = "--" if method["bytes"] is None else f"{method['bytes'] / 1e6:.2f}"
        cells = [escape(method["title"]), _share(method[task["headline"]]), _share(method["worst"]), *gains, size]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escape(text: Any) -> str:
    """Return ``text`` so that LaTeX prints it as it is."""
    return "".join(_TEX.get(c, c) for c in str(text))


def _share(cell: Json) -> str:
    if cell["value"] is None:
        return "--"
    ends = "" if cell["low"] is None else f" [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    return f"{100 * cell['value']:.1f}{ends}"


def _gain(pair: Json | None) -> str:
    if pair is None or pair["gain"] is None:
        return "--"
    text = f"{100 * pair['gain']:+.1f}"
    if pair["p_holm"] is not None and pair["p_holm"] < 0.05:
        text = rf"\mathbf{{{text}}}"
    ends = "" if pair["low"] is None else f" [${100 * pair['low']:+.1f}$, ${100 * pair['high']:+.1f}$]"
    return f"${text}${ends}"

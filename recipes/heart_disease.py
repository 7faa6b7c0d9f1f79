"""Heart disease at four real hospitals, as tables: methods and controls on a backbone that is no transformer.

    python recipes/heart_disease.py DATA --out results/heart-disease --page docs/results/heart-disease.md

DATA holds ``heart_disease.csv`` (Janosi, Steinbrunn, Pfisterer and Detrano 1989, CC BY 4.0; the clients of FLamby's
Fed-Heart-Disease) with the columns site, 13 features and num. The label is num > 0. Categories (cp, restecg, slope,
thal) become one column each; a cholesterol or blood pressure of 0 is a gap. FLamby drops what has gaps; here every row
and column stays. A comparison that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from confrere.compare import compare
from confrere.config import override, validate
from confrere.errors import DataError
from confrere.progress import progress
from confrere.report import write_report

METHODS = ("fedopal", "dual", "fedit-ft", "fedit", "local", "pooled")
SEEDS = (0, 1, 2)
CATEGORIES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2), "slope": (1, 2, 3), "thal": (3, 6, 7)}
NEVER_ZERO = ("chol", "trestbps")
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "controls": [],
    "rounds": 20,
    "backbone": {"name": "mlp"},
    "adapter": {"rank": 64},
    "train": {"batch_size": 32, "lr": 1e-3, "steps": 10},
}


def prepare(data: Path, out: Path) -> Path:
    """Write the table of numbers once and return it."""
    source, table = data / "heart_disease.csv", out / "heart.csv"
    if table.exists():
        return table
    if not source.exists():
        raise DataError("heart_disease.csv is missing", where=str(data), fix="give the folder that holds it")
    out.mkdir(parents=True, exist_ok=True)
    with source.open(newline="") as file:
        rows = [features(row) for row in csv.DictReader(file)]
    draft = table.with_suffix(".tmp")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(table)
    return table


def features(row: dict[str, str]) -> dict[str, Any]:
    """Return one patient's row: site, label, numbers, one column a category; a gap stays a gap."""
    made: dict[str, Any] = {"site": row["site"], "label": "disease" if float(row["num"]) > 0 else "healthy"}
    for name, cell in row.items():
        if name in ("site", "num"):
            continue
        gap = cell.strip() in ("", "?", "nan", "NaN") or (name in NEVER_ZERO and float(cell) == 0)
        for value in CATEGORIES.get(name, ()):
            made[f"{name}_{value}"] = "" if gap else int(float(cell) == value)
        if name not in CATEGORIES:
            made[name] = "" if gap else cell
    return made


def interval(found: dict[str, Any] | None, key: str = "mean") -> str:
    """Return ``72.1 (70.0 to 74.2)`` per cent."""
    if not found or found[key] is None:
        return "-"
    low, high = ("low", "high") if key == "mean" else (f"{key}_low", f"{key}_high")
    if found[low] is None:
        return f"{100 * found[key]:.1f}"
    return f"{100 * found[key]:.1f} ({100 * found[low]:.1f} to {100 * found[high]:.1f})"


def certain(pairs: list[dict[str, Any]]) -> str:
    """Return the pairs of methods whose adjusted p-value is below 0.05."""
    shown = [p for p in pairs if p["p_holm"] is not None and p["p_holm"] < 0.05]
    return ", ".join(f"`{p['a']}` over `{p['b']}` {100 * p['gain']:+.1f} points" for p in shown)


def page(found: dict[str, Any], command: str) -> str:
    """Return the results page in Markdown."""
    machine, sites = found["machine"], sorted(found["methods"][0]["sites"])
    lines = [
        "# Heart disease, four real hospitals, tables",
        "",
        f"Command: `{command}`. Date {found['date']}; {machine['cores']} cores, one thread a run, torch "
        f"{machine['torch']}, confrere {machine['confrere']}. Seeds {', '.join(map(str, found['seeds']))}; one split "
        "for all. 920 patients, 22 features and 22 indicators of gaps; every hospital standardises with its own "
        "training rows. Backbone [`mlp`](../tables.md): frozen random features, adapters of rank 64 in all.",
        "",
        "Per cent. Mean over sites on each site's own test patients, then mean and 95 % Student t interval over seeds: "
        "it holds the chance of training, not that of which patients were tested.",
        "",
        "| method | balanced accuracy | worst site | AUROC | ECE | general model alone | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in found["methods"]:
        numbers = [interval(m["balanced_accuracy"]), interval(m["balanced_accuracy"], "worst")]
        numbers += [interval(m[key]) for key in ("auroc", "ece", "general")]
        lines.append(f"| {m['title']} (`{m['name']}`) | " + " | ".join(numbers) + f" | {m['seconds']:.0f} |")
    lines += ["", f"**{found['recommendation']['headline']}**", ""]
    lines += [
        "Pairs of methods whose mean gain over sites and seeds is shown at 5 % (test patients resampled, Holm-adjusted "
    ]
    lines[-1] += f"over all pairs): {certain(found['overall']) or 'none'}."
    lines += ["", "Balanced accuracy by site:", "", "| method | " + " | ".join(sites) + " |"]
    lines.append("|---" * (len(sites) + 1) + "|")
    for m in found["methods"]:
        lines.append(f"| `{m['name']}` | " + " | ".join(interval(m["sites"][s]) for s in sites) + " |")
    lines += ["", "Test patients by site (the intervals above do not show how few they are):", ""]
    sheet = found["federation"]["sheet"]["sites"]
    for site in sites:
        classes = ", ".join(f"{counts['test']} {name}" for name, counts in sheet[site]["classes"].items())
        fewest = min(counts["test"] for counts in sheet[site]["classes"].values())
        moves = f"; one misjudged of {fewest} moves it by {50 / fewest:.0f} points" if 0 < fewest < 10 else ""
        lines.append(f"- {site}: {classes}; {sheet[site]['missing_values']} of all values missing{moves}")
    experiment = "\n".join(line for line in found["experiment"].splitlines() if not line.startswith("path = "))
    return "\n".join([*lines, "", "## The experiment", "", "```toml", experiment, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/heart-disease"))
    parser.add_argument("--methods", default=",".join(METHODS), help="a,b:key=value,c; the first is tested")
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = prepare(args.data, args.out / "data")
    experiment = validate(override({**SETTINGS, "path": str(table.resolve())}, args.overrides))
    with progress(quiet=False) as notify:
        found = compare(experiment, args.methods.split(","), SEEDS, args.out / "methods", notify=notify)
    print(write_report(args.out / "methods"))
    if args.page:
        shown = f" --methods {args.methods}" if args.methods != ",".join(METHODS) else ""
        args.page.write_text(page(found, f"python recipes/heart_disease.py DATA{shown}"))


if __name__ == "__main__":
    main()

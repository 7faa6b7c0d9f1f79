"""A hospital that arrives later, on HAM10000: a federation of three sites, then the fourth with 20 labelled images.

    python recipes/onboarding.py ham10000.csv --out results/onboarding --page tables.md

The CSV is the one that ``recipes/ham10000.py`` writes. For every site, method and seed it does what these do:

    confrere run ham10000.csv --out RUN --method METHOD --hold-out SITE --seed SEED controls=[] ...
    confrere onboard RUN ham10000.csv --images 20 --seed SEED

What was done is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from ham10000 import SETTINGS, SMALL

from confrere.compare.table import interval
from confrere.config import override, validate
from confrere.job import run_experiment
from confrere.onboard import onboard
from confrere.record.files import read_json

SITES = ("vidir_modern", "rosendahl")
METHODS = ("fedopal", "fedit")
SEEDS = (0, 1, 2)


def one(args: argparse.Namespace, site: str, method: str, seed: int) -> dict[str, Any]:
    """Return onboard.json of one site, method and seed."""
    table, out = args.table, args.out
    run = out / f"{method}-without-{site}-{seed}"
    found = run / "onboard" / site / "onboard.json"
    if not found.exists():
        values = {**SETTINGS, "path": str(table.resolve()), "method": method, "hold_out": site, "seed": seed}
        run_experiment(validate(override(values, [*SMALL, *args.overrides])), run)
        onboard(run, table, site=site, images=args.images, seed=seed)
    return read_json(found)


def cell(values: list[float], *, points: bool = False) -> str:
    """Return mean and 95 % Student t interval over seeds, of scores or of differences in points."""
    if points:  # a difference may be negative: its interval is that of a share, moved there and back
        known = interval([(1 + value) / 2 for value in values])
        mean, low, high = (100 * (2 * float(known[key] or 0.0) - 1) for key in ("mean", "low", "high"))
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    known = interval(values)
    return f"{known['mean']:.3f} ({known['low']:.3f} to {known['high']:.3f})"


def rows(found: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return candidate, balanced accuracy, gain over training alone in points, and how often it was chosen."""
    scores = {name: [score(one, name) for one in found] for name in found[0]["candidates"]}
    scores["what was chosen"] = [score(one, one["chosen"]) for one in found]
    lines = []
    for name, values in scores.items():
        gain = [value - alone for value, alone in zip(values, scores["alone"], strict=True)]
        times = str(sum(one["chosen"] == name for one in found)) if name in found[0]["candidates"] else ""
        lines.append((name, cell(values), "" if name == "alone" else cell(gain, points=True), times))
    return lines


def score(found: dict[str, Any], name: str) -> float:
    """Return one candidate's balanced accuracy on the newcomer's test images."""
    return float(found["candidates"][name]["metrics"]["balanced_accuracy"]["value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/onboarding"))
    parser.add_argument("--sites", default=",".join(SITES))
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.path=value, e.g. engine.precision=fp32")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    for site in args.sites.split(","):
        for method in METHODS:
            found = [one(args, site, method, seed) for seed in SEEDS]
            tested = " or ".join(sorted({str(entry["test_images"]) for entry in found}))
            lines += ["", f"### {site} arrives, after {method} ({tested} test images)", ""]
            lines += ["| model | balanced accuracy | against alone, points | chosen |", "|---|---|---|---|"]
            lines += ["| " + " | ".join(row) + " |" for row in rows(found)]
            print("\n".join(lines), flush=True)
    if args.page:
        args.page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

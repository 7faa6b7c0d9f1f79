"""What does bfloat16 do to the scores? The same runs in both precisions, seed by seed.

    python benchmarks/precision.py ham10000.csv --seeds 0,1,2 --out precision.json

Prints each precision's balanced accuracy (mean over sites, test images of the chosen round) and the paired difference
with its 95 % interval over seeds (Student's t). Settings are fixed beforehand; nothing is tuned here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from scipy.stats import t as student
from side_by_side import machine

SETTINGS = ["controls=[]", "rounds=10", "train.steps=20", "train.batch_size=16", "backbone.image_size=98"]


def score(table: Path, method: str, precision: str, seed: int) -> float:
    """Return the mean balanced accuracy over sites."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        line = [sys.executable, "-m", "confrere", "run", str(table), "--out", f"{name}/run", "--method", method]
        line += [*SETTINGS, f"engine.precision={precision}", f"seed={seed}"]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(Path(name, "run/results.json").read_text())
    models = [site["models"]["personalised"] or site["models"]["general"] for site in found["sites"].values()]
    return statistics.mean(model["balanced_accuracy"]["value"] for model in models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--method", default="fedopal")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if len(seeds) < 2:
        raise SystemExit("an interval over seeds needs at least two")
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in seeds:
        for precision, scores in found.items():
            scores.append(score(args.table, args.method, precision, seed))
    gaps = [half - full for full, half in zip(found["fp32"], found["bf16"], strict=True)]
    centre, spread = statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    half = float(student.ppf(0.975, len(gaps) - 1)) * spread
    for precision, scores in found.items():
        print(f"{precision}: {statistics.mean(scores):.4f}")
    print(f"bf16 - fp32: {centre:+.4f} ({centre - half:+.4f} to {centre + half:+.4f}), {len(seeds)} seeds")
    if args.out:
        kept = {"date": str(date.today()), "machine": machine(None), "method": args.method, "settings": SETTINGS}
        kept |= {"seeds": seeds, "runs": found, "difference": [centre, centre - half, centre + half], "figures": {}}
        args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

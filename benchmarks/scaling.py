"""Do time and memory grow with the number of sites? The same images dealt out to 4, 16, 64 and 256 of them.

    python benchmarks/scaling.py ham10000.csv --sites 4,16,64,256 --steps 1024 --out scaling.json

Every run takes ``--steps`` optimiser steps a round in total, whatever the number of sites. A run of one step a site
fills the cache first; then one is measured from start to report. A table of the same images without the
column ``site`` is written beside the given one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import date
from pathlib import Path
from typing import Any

from shared_job import narrowed
from side_by_side import MARK, Memory, machine


def run(table: Path, sites: int, args: argparse.Namespace, cache: Path, *, fill: bool = False) -> dict[str, Any]:
    """Return time and peak memory of one run; ``fill`` takes one step a site."""
    rounds, steps = (1, 1) if fill else (args.rounds, max(1, args.steps // sites))
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        line = [sys.executable, "-m", "confrere", "run", str(table), "--out", f"{work}/run", "--method", args.method]
        line += [f"rounds={rounds}", "controls=[]", f"train.steps={steps}"]
        line += ["train.batch_size=32", f"selection.every={rounds}", "backbone.depth=12", "adapter.blocks=4"]
        line += [f"engine.precision={args.precision}", "backbone.image_size=98", "threads=1"]
        line += [f'data.partition={{by="quantity",alpha=1000.0,sites={sites}}}']
        memory = Memory(mark)
        memory.start()
        began = time.perf_counter()
        environment = {**os.environ, MARK: mark, "CONFRERE_CACHE": str(cache)}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        took = time.perf_counter() - began
        memory.done.set()
        memory.join()
        if done.returncode:
            raise SystemExit(done.stderr)
        events = [json.loads(text) for text in Path(work, "run/events.jsonl").read_text().splitlines()]
        results = json.loads(Path(work, "run/results.json").read_text())
    return {
        "sites": sites,
        "seconds": took,
        "train_to_export": results["seconds"],
        "rounds": [event["seconds"] for event in events if event["event"] == "round"],
        "peak_mb": memory.peak / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--sites", default="4,16,64,256")
    parser.add_argument("--method", default="fedopal")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1024, help="a round, over all sites")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cache", type=Path, help="kept, so that a benchmark that was stopped continues soon")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table, found = narrowed(args.table, pool=True), []
    with tempfile.TemporaryDirectory() as own:
        cache = (args.cache or Path(own)).resolve()
        for sites in map(int, args.sites.split(",")):
            run(table, sites, args, cache, fill=True)
            found.append(run(table, sites, args, cache))
            row = found[-1]
            growth = [row[key] / found[0][key] for key in ("seconds", "peak_mb")]
            print(f"{sites:4d} sites: {row['seconds']:.1f} s (x{growth[0]:.2f}), ", end="")
            print(f"{row['peak_mb']:.0f} MB (x{growth[1]:.2f}), rounds {row['rounds']}", flush=True)
            if args.out:
                settings = {k: v for k, v in vars(args).items() if k not in ("out", "table", "cache")}
                ratios = {
                    f"{key}, {found[0]['sites']} sites over {sites}": found[0][key] / row[key]
                    for key in ("seconds", "peak_mb")
                }
                kept = {
                    "date": str(date.today()),
                    "machine": machine(None),
                    **settings,
                    "figures": ratios,
                    "runs": found,
                }
                args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

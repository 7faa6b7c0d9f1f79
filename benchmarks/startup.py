"""How soon does a run take its first training step? Once with an empty cache, then with what that run left in it.

    python benchmarks/startup.py ham10000.csv --repeats 5 --out startup.json

Seconds from the start of the process to the first site's state on disk after one training step. The process is ended
there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from side_by_side import machine


def start(table: Path, cache: Path) -> float:
    """Return the seconds until the first step of one run."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        sites = Path(name, "run/sites")
        line = [sys.executable, "-m", "confrere", "run", str(table), "--out", f"{name}/run", "--method", "fedit"]
        line += ["controls=[]", "backbone.image_size=98", "rounds=1", "train.steps=1"]
        began = time.time()
        with subprocess.Popen(
            line,
            env={**os.environ, "CONFRERE_CACHE": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while not (done := sorted(sites.glob("*/00001.safetensors"))):
                if process.poll() is not None:
                    raise SystemExit(f"the run ended with exit code {process.returncode} before its first step")
                time.sleep(0.01)
            took = done[0].stat().st_mtime - began
            process.kill()
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        cold = start(args.table, Path(cache))
        warm = [start(args.table, Path(cache)) for _ in range(args.repeats)]
    print(
        f"empty cache: {cold:.1f} s; second runs: median {statistics.median(warm):.2f} s ({min(warm):.2f} to ", end=""
    )
    print(f"{max(warm):.2f})")
    if args.out:
        found = {"date": str(date.today()), "machine": machine(None), "cold": cold, "warm": warm}
        found["figures"] = {"second run starts within 3 s, times over": 3 / statistics.median(warm)}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

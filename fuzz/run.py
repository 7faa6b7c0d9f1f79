"""Fuzz every parser in turn: ``python fuzz/run.py --minutes 10``; needs the extra ``fuzz``.

Each target is a function from bytes that may let out nothing but ``ConfrereError`` and may take no longer than two
seconds. What breaks this is kept below ``--findings``; run it again alone with ``--one TARGET FILE``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = ("fuzz_manifest", "fuzz_update", "fuzz_checkpoint", "fuzz_journal")
SLOWEST, MEGABYTES = 2, 2048


def fuzz_one(name: str, arguments: list[str]) -> None:
    """Run one target in this process under the fuzzer, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["confrere", "tomllib"]):
        module = importlib.import_module(name)
    atheris.Setup([sys.argv[0], *arguments], module.target)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, findings: Path) -> dict[str, Any]:
    """Return what ``seconds`` of fuzzing found."""
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as seeds:
        for number, seed in enumerate(importlib.import_module(name).SEEDS):
            (Path(seeds) / f"{number}").write_bytes(seed)
        options = [
            f"-max_total_time={seconds}",
            f"-timeout={SLOWEST}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-artifact_prefix={findings}/{name}-",
            "-max_len=20000",
            "-print_final_stats=1",
        ]
        started = time.monotonic()
        command = [sys.executable, __file__, "--one", name, seeds, *options]
        done = subprocess.run(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, check=False)
        found = {"executions": r"stat::number_of_executed_units:\s+(\d+)", "peak_mb": r"stat::peak_rss_mb:\s+(\d+)"}
        numbers = {key: int(m[1]) if (m := re.search(p, done.stdout)) else None for key, p in found.items()}
        covered = re.findall(r"cov: (\d+)", done.stdout)
        return {
            "target": name,
            "clean": done.returncode == 0,
            "seconds": round(time.monotonic() - started, 1),
            **numbers,
            "covered": int(covered[-1]) if covered else None,
            "end": "" if done.returncode == 0 else done.stdout[-3000:],
        }


def main() -> int:
    """Return 0 when every target came through."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--only", choices=TARGETS, action="append", help="some targets instead of all")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder for inputs that break a target")
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if asked.one:
        fuzz_one(asked.one[0], asked.one[1:])
    results = []
    for name in asked.only or TARGETS:
        results.append(fuzz(name, round(60 * asked.minutes), asked.findings.resolve()))
        print({key: value for key, value in results[-1].items() if key != "end"}, flush=True)
        if not results[-1]["clean"]:
            print(results[-1]["end"], file=sys.stderr)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    kept = {"when": when, "python": platform.python_version(), "slowest_s": SLOWEST, "results": results}
    if asked.out:
        asked.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result["clean"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())

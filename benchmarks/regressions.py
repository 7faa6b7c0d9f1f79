"""Name every figure of a benchmark that fell by more than a fifth against a committed result.

    python benchmarks/regressions.py new.json benchmarks/results/2026-11-24-ham10000.json

Every benchmark's ``--out`` file holds ``figures``: ratios by name, higher is better. Ends with exit code 1 if one fell,
with 2 if the two results are of another processor or of other settings, so that nothing can be said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOLERATED = 0.8


def regressions(new: dict[str, float], committed: dict[str, float]) -> list[str]:
    """Return a line for every figure of both results that fell by more than a fifth."""
    return [
        f"regression: {name}: {new[name]:.2f}, was {then:.2f}"
        for name, then in committed.items()
        if name in new and new[name] < TOLERATED * then
    ]


def settings(result: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal for two results to be compared: processor, cores and settings, not versions."""
    found = {k: v for k, v in result.items() if isinstance(v, (str, int)) and k not in ("date", "torch", "revision")}
    job = {
        f"{part}.{k}": v
        for part, table in result.get("job", {}).items()
        if isinstance(table, dict)
        for k, v in table.items()
    }
    return found | job | {k: result.get("machine", {}).get(k) for k in ("cpu", "cores")}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    results = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    now, then = (settings(result) for result in results)
    other = [f"{k}: {now[k]} now, {then[k]} then" for k in then if k in now and now[k] != then[k]]
    if other:
        print("not comparable: " + "; ".join(other))
        raise SystemExit(2)
    new, committed = (result["figures"] for result in results)
    missing = sorted(set(committed) - set(new))
    if missing:
        print("not measured this time: " + ", ".join(missing))
    found = regressions(new, committed)
    print("\n".join(found) or f"none of {len(set(new) & set(committed))} figures fell by more than a fifth")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()

"""Name every figure of a benchmark that fell by more than a fifth against a committed result.

    python benchmarks/regressions.py new.json benchmarks/results/2026-11-24-ham10000.json

Every benchmark's ``--out`` file holds ``figures``: ratios by name, higher is better. Ends with exit code 1 if one fell.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOLERATED = 0.8


def regressions(new: dict[str, float], committed: dict[str, float]) -> list[str]:
    """Return a line for every figure of both results that fell by more than a fifth."""
    return [
        f"regression: {name}: {new[name]:.2f}, was {then:.2f}"
        for name, then in committed.items()
        if name in new and new[name] < TOLERATED * then
    ]


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    new, committed = (json.loads(Path(path).read_text())["figures"] for path in sys.argv[1:])
    missing = sorted(set(committed) - set(new))
    if missing:
        print("not measured this time: " + ", ".join(missing))
    found = regressions(new, committed)
    print("\n".join(found) or f"none of {len(set(new) & set(committed))} figures fell by more than a fifth")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()

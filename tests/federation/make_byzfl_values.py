"""Write byzfl_values.json: what another library makes of the same updates. Not run by the tests.

    python3 -m venv oracle && oracle/bin/pip install byzfl==0.0.11
    oracle/bin/python tests/federation/make_byzfl_values.py

Its Krum sums over one neighbour more than Blanchard et al. do, so it is asked with f + 1. Its median of tensors is the
lower of the middle two; arrays give the mean of both, as ours. Its geometric median takes a fixed number of steps.
"""

from __future__ import annotations

import contextlib
import io
import json
from importlib.metadata import version
from pathlib import Path

import byzfl
import numpy as np

CASES = [(5, 7, 0, 1), (8, 12, 1, 2), (10, 20, 2, 3), (11, 6, 4, 4)]  # sites, dimensions, f, seed


def updates(n: int, d: int, f: int, seed: int) -> np.ndarray:
    """Return updates around 1, the last f of which are far off."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(1.0, 1.0, (n, d))
    drawn[n - f :] *= -20
    return drawn


def main() -> None:
    cases = []
    for n, d, f, seed in CASES:
        x = updates(n, d, f, seed)
        rules = {
            "mean": byzfl.Average(),
            "median": byzfl.Median(),
            "trimmed-mean": byzfl.TrMean(f),
            "geometric-median": byzfl.GeometricMedian(nu=1e-9, T=3000),
            "clipping": byzfl.Clipping(c=float(np.median(np.linalg.norm(x, axis=1)))),
        }
        if n >= 2 * f + 3:
            rules["krum"] = byzfl.Krum(f + 1)
        with contextlib.redirect_stdout(io.StringIO()):  # some versions print
            found = {name: np.asarray(rule(x.copy())).tolist() for name, rule in rules.items()}
            found["nearest-neighbours"] = np.asarray(byzfl.TrMean(f)(byzfl.NNM(f)(x.copy()))).tolist()
        cases.append({"byzantine": f, "seed": seed, "updates": x.tolist(), "values": found})
    content = {"byzfl": version("byzfl"), "numpy": np.__version__, "cases": cases}
    Path(__file__).with_name("byzfl_values.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

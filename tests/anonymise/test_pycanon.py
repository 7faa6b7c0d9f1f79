"""What pyCANON finds in a table that was written. Its pins contradict ours, so it runs in an environment of its own.

    make .venv-pycanon/.installed  # `make test-all` does this, too
    CONFRERE_PYCANON=.venv-pycanon/bin/python pytest -m slow tests/anonymise/test_pycanon.py

pyCANON knows no k^m: for each set of items it is given the rows of a table that have it, of which every one left must
share its identifiers with k - 1 others.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import anon_tables as tables
import pytest

from confrere.anonymise.generalise import anonymise
from confrere.anonymise.table import as_csv, examine, rows_of

PYTHON = os.environ.get("CONFRERE_PYCANON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs CONFRERE_PYCANON: the interpreter of an environment with pycanon"),
]
SCRIPT = """
import itertools, json, sys
import pandas as pd
from pycanon import anonymity

def examined(path, m):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    found = {
        "k": anonymity.k_anonymity(table, identifiers),
        "l": anonymity.l_diversity(table, identifiers, ["y"]),
        "t": anonymity.t_closeness(table, identifiers, ["y"]),
    }
    sets = [set(cell.split(";")) - {""} for cell in table["i"]] if "i" in table else []
    names, least = sorted(set().union(*sets)) if sets else [], len(table)
    for size in range(1, m + 1):
        for some in itertools.combinations(names, size):
            rows = [number for number, own in enumerate(sets) if own >= set(some)]
            if rows:
                least = min(least, anonymity.k_anonymity(table.iloc[rows].reset_index(drop=True), identifiers))
    return found | {"km": int(least)}

identifiers = ["age", "place", "sex"]
print(json.dumps([examined(path, int(sys.argv[1])) for path in sys.argv[2:]]))
"""


def pycanon(m: int, *paths: Path) -> list[dict[str, Any]]:
    """Return what pyCANON says of each table."""
    command = [PYTHON, "-W", "ignore", "-c", SCRIPT, str(m), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("k", "m", "until"), [(2, 1, 0.0), (3, 2, 0.3), (5, 2, 0.6)])
def test_pycanon_finds_k_l_t_and_with_each_set_of_items_k_again(tmp_path: Path, k: int, m: int, until: float) -> None:
    plan = tables.make(tmp_path, k=k, m=m, merge_until=until)
    both, expected, files = [], [], [tmp_path / f"{name}.csv" for name in ("one", "other", "union")]
    for seed in (0, 1):
        known = tables.records(plan, tables.rows(90, seed=seed))
        rows = rows_of(plan, known, anonymise(plan, known))
        both += rows
        files[seed].write_bytes(as_csv(plan, rows))
        expected.append(examine(plan, rows, known.units))
    files[2].write_bytes(as_csv(plan, both))
    *found, union = pycanon(m, *files)
    for one, own in zip(found, expected, strict=True):
        assert (one["k"], one["l"], one["km"]) == (own["smallest_class"], own["l"], own["smallest_support"])
        assert one["t"] == pytest.approx(own["t"], abs=1e-6)
        assert min(one["k"], one["km"]) >= k
    assert min(union["k"], union["km"]) >= k


def test_pycanon_finds_k_patients_where_each_counts_once_in_a_class(tmp_path: Path) -> None:
    plan = tables.make(tmp_path, k=4, items=None)
    known = tables.records(plan, tables.rows(150, seed=2, patients=40))
    rows = rows_of(plan, known, anonymise(plan, known))
    once = {(row[:3], unit): row for row, unit in zip(rows, known.units.tolist(), strict=True)}
    (tmp_path / "once.csv").write_bytes(as_csv(plan, list(once.values())))
    assert pycanon(1, tmp_path / "once.csv")[0]["k"] == examine(plan, rows, known.units)["smallest_class"] >= 4


def test_pycanon_notices_a_table_that_was_not_generalised(tmp_path: Path) -> None:
    plan = tables.make(tmp_path, k=2)
    rows = [tuple(one[key] for key in ("age", "place", "sex", "i", "y")) for one in tables.rows(100)]
    (tmp_path / "bare.csv").write_bytes(as_csv(plan, rows))
    assert pycanon(1, tmp_path / "bare.csv")[0]["k"] == 1

"""G25 in small: six kills around the debits of a private run. A hundred: ledger_kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_kills import measure


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_never_enters_less_than_it_trained(tmp_path: Path) -> None:
    found = measure(tmp_path / "kills.json", tmp_path.resolve(), kills=6, seed=1)
    print(f"\nG25: {found['good']} of {found['killed']}")
    assert found["killed"] == found["good"] >= 6, found["cases"]
    assert all(case["trained"] >= 8 for case in found["cases"])

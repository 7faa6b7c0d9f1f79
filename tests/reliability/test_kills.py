"""G1, G2 in small: twenty kills of a short run. A hundred of fifty rounds: kills.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kills import POINTS, measure

from confrere.record.machine import cores


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_resume_to_the_same_bytes(tmp_path: Path) -> None:
    found = measure(tmp_path / "kills.json", tmp_path.resolve(), kills=20, rounds=6, seed=1, jobs=cores(), fork=True)
    numbers = found["summary"]
    print(f"\nG1: {numbers['same']} of {numbers['killed']}; {json.dumps(numbers)}")
    wrong = [case for case in found["cases"] if not case["same"]]
    assert not wrong
    assert numbers["killed"] >= 20
    assert numbers["most_trainings_redone"] <= 1
    assert numbers["left_over"] == 0
    assert len(numbers["points"]) >= 7
    assert set(numbers["points"]) <= set(POINTS)

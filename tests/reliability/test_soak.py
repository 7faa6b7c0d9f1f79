"""G6: five hundred rounds take no more memory and no more open files than fifty."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
ROUNDS, SETTLED, LIMIT = 500, 50, 0.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_and_open_files_stay(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "soak.py"), str(tmp_path / "run"), str(ROUNDS)],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rounds, memory, files = np.array(json.loads(done.stdout.splitlines()[-1])).T
    late = rounds > SETTLED
    slope = float(np.polyfit(rounds[late], memory[late], 1)[0]) * 100
    print(f"\nG6: {slope:+.2f} MB per 100 rounds after round {SETTLED} (limit {LIMIT}), at most {memory.max():.0f} MB")
    print(f"open files {sorted(set(files[late].astype(int).tolist()))}")
    assert len(rounds) == ROUNDS
    assert len(set(files[late].tolist())) == 1
    assert slope < LIMIT

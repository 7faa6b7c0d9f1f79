"""G9: every hostile input is refused with its class, its file and a way to mend it, soon and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import CASES
from hostile_case import Base, Case
from hostile_open import WAYS

from confrere.backbones.quiet import quiet
from confrere.errors import ConfrereError

SECONDS, MEGABYTES = 2.0, 300
FEWEST = 200


def peak() -> int:
    """Return the largest resident size since the last reset, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    rows = status.read_text().splitlines() if status.exists() else []
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("VmHWM")), 0)


def reset() -> int:
    """Let the largest resident size begin anew at the present one, and return it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()  # an older peak hides a smaller one: the test is weaker, not wrong
    return peak()


def test_the_corpus_is_large_and_every_name_is_there_once() -> None:
    assert len(CASES) >= FEWEST
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.opened for case in CASES} == set(WAYS)


@pytest.mark.timeout(120, func_only=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input(case: Case, base: Base, tally: list[tuple[Case, float, float]], tmp_path: Path) -> None:
    opened = case.make(tmp_path / "case", base)
    if case.opened == "backbone":
        import transformers  # noqa: F401  its import is not the case's time
    before, started = reset(), time.process_time()
    said, error = "", None
    try:
        with quiet():
            said = WAYS[case.opened](opened, base)
    except ConfrereError as refusal:
        error = refusal
    seconds, megabytes = time.process_time() - started, (peak() - before) / 1e6
    if error is None:
        assert case.error is None, f"accepted: {said}"
        assert case.says in said
    else:
        assert type(error).__name__ == case.error, error
        assert case.says in error.reason
        assert case.names in error.where
        assert error.where
        assert error.fix
        assert getattr(error, "code", "") == case.code or not case.code
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
    tally.append((case, seconds, megabytes))


REAL = [
    "image/png-169-mpx", "image/pipe", "table/zero-byte", "table/million-columns", "manifest/deep-table",
    "experiment/100-mb", "experiment/lr-nan", "override/deep", "backbone/weights-torch", "resume/picture-flipped",
    "resume/machine-list", "predict/head-nan",
]  # fmt: skip


def words(case: Case, opened: Path, base: Base) -> list[object]:
    """Return the command that opens a case."""
    new = ["--out", opened.parent / "new", "--quiet", "--backbone", "test-vit"]
    return {
        "picture": ["data", "check", opened, "data.on_bad=stop"],
        "data": ["data", "check", opened],
        "experiment": ["run", base.data, "--config", opened, *new],
        "override": ["run", base.data, *new, opened.read_text() if opened.is_file() else ""],
        "backbone": ["run", base.data, *new[:-1], opened, "adapter.blocks=1"],
        "resume": ["resume", opened],
        "predict": ["predict", opened, base.data / "a" / "x", "--site", "a", "--out", opened.parent / "p.csv"],
    }[case.opened]


CODES = {"ConfigError": 2, "DataError": 3, "BackboneError": 4, "RunError": 5}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_command_line_says_the_same(name: str, base: Base, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    opened = case.make(tmp_path / "case", base)
    command = [sys.executable, "-m", "confrere", *map(str, words(case, opened, base))]
    environment = {**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == CODES[case.error or ""], printed
    assert "Traceback" not in printed
    assert case.says in printed
    assert "Fix: " in printed

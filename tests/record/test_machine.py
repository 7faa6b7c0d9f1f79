"""What is said of the machine."""

from __future__ import annotations

import pytest

from confrere.record.machine import cores, most_threads


@pytest.mark.parametrize(("asked", "most"), [("1", 1), ("", None), ("many", None), ("0", None), ("999", None)])
def test_threads_are_at_most_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, asked: str, most: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert most_threads() == (most or cores())

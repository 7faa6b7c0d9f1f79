"""A server of the live page for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import watch_runs as runs

from confrere.watch.serve import Served, start

TOKEN = "a-token-that-only-tests-know"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A run of which one round is committed, served on a free port."""
    run = runs.begin(tmp_path / "run", controls=("local",))
    runs.one_round(run, 1)
    made = start(run, port=0, token=TOKEN)
    yield made
    made.stop()


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    """Whoever has the token."""
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {TOKEN}"}, verify=False) as made:
        yield made


@pytest.fixture
def stranger(served: Served) -> Iterator[httpx.Client]:
    """Whoever has not."""
    with httpx.Client(base_url=served.url, verify=False) as made:
        yield made

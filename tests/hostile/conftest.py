"""One base of whole things for all hostile tests, and a line that says how many inputs did as they should."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hostile_case import Base, Case


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    """Whole things to damage copies of, made with a cache of their own."""
    root = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(root / "cache"))
        made = Base(root)
        assert made.run.exists()
        assert made.backbone.exists()
        yield made


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[list[tuple[Case, float, float]]]:
    """Collects the cases that did as they should, with processor time in seconds and memory in MB."""
    passed: list[tuple[Case, float, float]] = []
    yield passed
    asked = sum(item.fspath == request.node.fspath and "case" in item.fixturenames for item in request.session.items)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        slowest, largest = (max((row[i] for row in passed), default=0.0) for i in (1, 2))
        print(f"\nG9: {len(passed)} of {asked} hostile inputs; at most {slowest:.1f} s and {largest:.0f} MB each")

"""One small federation and one run for all tests of forgetting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forgetting_runs import hospitals, trained


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospitals(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return trained(data, tmp_path_factory.mktemp("runs") / "run")

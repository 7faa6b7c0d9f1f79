"""Kits that are made once, and a copy of them for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from consortium_kits import copied, made


@pytest.fixture(scope="session")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("provisioned"))[0]


@pytest.fixture
def kits(provisioned: Path, tmp_path: Path) -> Path:
    return copied(provisioned, tmp_path)

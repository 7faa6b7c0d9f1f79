"""What tests of a consortium begin with; each module makes ``images`` of its own number."""

from __future__ import annotations

from pathlib import Path

import pytest
from members import Members, make_kits, make_members


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("kits"))


@pytest.fixture
def members(kits: Path, images: Path, tmp_path: Path) -> Members:
    return make_members(kits, images, tmp_path / "state")

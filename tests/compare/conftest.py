"""Data for comparisons, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from confrere.data.synthetic import make_microscopy


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    for name, seed in (("north", 3), ("south", 4)):
        make_microscopy(root / name, seed=seed, sites=2, images=(72, 80), size=32)
    return root / "north", root / "south"


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    patch = pytest.MonkeyPatch()
    patch.setenv("CONFRERE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()

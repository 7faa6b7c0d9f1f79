"""The recipe of two stages: sites share no image, stage 1 hands adapters over and no head, and every arm is trained."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from confrere.job import initial
from confrere.seeds import numpy_generator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe() -> Any:
    pytest.importorskip("sklearn", reason="its digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "recipes")
        return importlib.import_module("two_stage")


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.1])
def test_sites_share_no_image_and_have_as_many_each(recipe: Any, alpha: float) -> None:
    labels = numpy_generator(0, "labels").integers(5, 10, 700)
    rows = recipe.dealt(labels, 80, alpha, numpy_generator(1, "deal"))
    assert [len(one) for one in rows] == [80] * recipe.SITES
    assert len(np.unique(np.concatenate(rows))) == 80 * recipe.SITES
    skew = np.mean([np.bincount(labels[one]).max() / 80 for one in rows])
    assert (0.2 <= skew < 0.35) if not alpha else skew > (0.5 if alpha < 1 else 0.35)


def test_stage_2_starts_from_adapters_without_their_head(recipe: Any, tmp_path: Path) -> None:
    public = recipe.stage_1(0, tmp_path, [])
    found = recipe.cell(0, 10, 0.0, public, tmp_path, ["rounds=2"])
    task = recipe.opened(
        {"a": (np.zeros((4, 64)), np.arange(4)), "test": (np.zeros((4, 64)), np.arange(4))}, 0, tmp_path / "x.csv", []
    )
    start = initial(task, "")
    heads = [name for name in public if name.startswith("head.")]
    assert heads
    assert all(not public[name].any() for name in heads)
    moved = [name for name in start if name not in heads and not torch.equal(start[name], public[name])]
    assert len(moved) == len(start) - len(heads)
    assert sorted(found) == sorted(
        f"{how}, from {what}" for how in ("together", "alone", "pooled") for what in ("scratch", "stage 1")
    )
    assert all(0.2 < value <= 1 for value in found.values())
    assert "+0.0" in recipe.signed([0.0, 0.0])

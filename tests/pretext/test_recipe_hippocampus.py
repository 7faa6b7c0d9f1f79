"""The recipe of hippocampus segmentation on synthetic volumes, for two steps."""

from __future__ import annotations

import gzip
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from confrere.errors import ConfigError, DataError
from confrere.seeds import numpy_generator, torch_generator
from confrere.tasks.segmentation import Segmentation

SHORT = ["train=2", "test=1", "pretext=1", "few=1", "more=1"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    import hippocampus  # type: ignore[import-not-found]

    monkeypatch.setattr(hippocampus, "WHOLE", (16, 32, 24))
    monkeypatch.setattr(hippocampus, "PATCH", (16, 32, 16))
    return hippocampus


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import nibabel

    with zipfile.ZipFile(tmp_path / "volumes.zip", "w") as archive:
        for number in range(3):
            rng = numpy_generator(number, "hippocampus test")
            labels = rng.integers(0, 3, (14, 30, 20)).astype(np.float32)
            for folder, voxels in (("images", labels + rng.random(labels.shape, dtype=np.float32)), ("labels", labels)):
                image = nibabel.Nifti1Image(voxels, np.eye(4))
                archive.writestr(f"{folder}/h{number}.nii.gz", gzip.compress(image.to_bytes()))
    return tmp_path


def call(recipe: Any, monkeypatch: pytest.MonkeyPatch, data: Path, *more: str) -> None:
    options = ["--out", str(data / "out"), "--arms", "random,lwi", "--seeds", "0", "--page", str(data / "page.md")]
    monkeypatch.setattr(sys, "argv", ["hippocampus.py", str(data), *options, *SHORT, *more])
    recipe.main()


def test_the_loss_is_that_of_images(recipe: Any) -> None:
    scores = torch.randn(3, 3, 6, 5, generator=torch_generator(0, "scores"))
    labels = torch.randint(0, 3, (3, 6, 5), generator=torch_generator(0, "labels"))
    flat = Segmentation().objective("dice-cross-entropy")(scores, labels)
    torch.testing.assert_close(recipe.loss(scores[..., None], labels[..., None]), flat)


def test_arms_are_trained_once_and_fill_the_page(recipe: Any, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    call(recipe, monkeypatch, data)
    page = (data / "page.md").read_text()
    for row in ("\n| random start | 1 |", "\n| random start | 2 |", "\n| LWI | 1 + 1 |"):
        assert page.count(row) == 2  # few and more are alike here
    assert page.count("\n| LWI | anywhere |") == page.count("\n| LWI | middle |") == 1
    monkeypatch.setattr(recipe, "run", None)  # all is there: nothing is trained again
    call(recipe, monkeypatch, data)
    assert (data / "page.md").read_text() == page
    with pytest.raises(ConfigError, match="other settings"):
        call(recipe, monkeypatch, data, "lr=0.1")


def test_splits_are_disjoint_and_share_their_test_volumes(recipe: Any) -> None:
    names = [f"h{number}" for number in range(30)]
    parts = [recipe.split(names, seed, {"train": 5, "test": 8}) for seed in (0, 1)]
    assert parts[0][1] == parts[1][1]
    assert parts[0][0] != parts[1][0]
    assert all(len({*train, *test}) == 13 for train, test in parts)
    with pytest.raises(DataError, match="too few"):
        recipe.split(names[:12], 0, {"train": 5, "test": 8})


def test_an_override_that_sets_nothing_is_refused(recipe: Any) -> None:
    assert recipe.changed(["few=7"])["few"] == 7
    for text in ("steps=3", "few", "few=many"):
        with pytest.raises(ConfigError, match="sets nothing"):
            recipe.changed([text])

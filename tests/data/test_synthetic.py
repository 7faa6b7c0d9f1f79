from __future__ import annotations

import hashlib

import numpy as np
import pytest
from data_files import load
from PIL import Image

from confrere.data.painting import CLASSES
from confrere.data.synthetic import make_microscopy
from confrere.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_microscopy(tmp_path_factory.mktemp("synthetic") / "hospitals", seed=0, images=(30, 60), size=48)


def contents(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.png"))}


def test_it_is_a_federation_marked_as_synthetic(folder, tmp_path):
    federation = load(folder, tmp_path / "cache")
    assert federation.synthetic
    assert set(federation.classes) == set(CLASSES)
    assert [site.name for site in federation.sites] == ["ashford", "brindley", "corvale", "dunmore"]
    assert [len(site.images) for site in federation.sites] == [60, 48, 38, 30]
    totals = {site.name: np.bincount(site.labels, minlength=4) for site in federation.sites}
    assert [int((count == 0).sum()) for count in totals.values()] == [0, 0, 0, 1]
    assert federation.sheet["shared_patients"] == federation.sheet["shared_pictures"] == 0
    assert all(len(site.indices("test")) for site in federation.sites)


def test_sites_differ_in_colour(folder, tmp_path):
    sheet = load(folder, tmp_path / "cache").sheet["sites"]
    means = np.array([site["channel_mean"] for site in sheet.values()])
    gaps = np.abs(means[:, None] - means[None]).max(-1)
    assert gaps[~np.eye(4, dtype=bool)].min() > 8


def test_the_seed_decides_everything(tmp_path):
    options = {"sites": 2, "images": (8, 8), "size": 32}
    first, again, other = (
        contents(make_microscopy(tmp_path / name, seed=seed, **options))
        for name, seed in (("x", 1), ("y", 1), ("z", 2))
    )
    assert first == again
    assert first != other
    assert len(first) == 16


def test_size_and_mode(folder):
    with Image.open(next(folder.rglob("*.png"))) as image:
        assert (image.size, image.mode) == ((48, 48), "RGB")


@pytest.mark.parametrize("options", [{"sites": 1}, {"sites": 9}, {"images": (5, 9)}, {"size": 16}])
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(DataError, match="must be"):
        make_microscopy(tmp_path / "x", seed=0, **options)


def test_a_folder_in_use_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        make_microscopy(tmp_path, seed=0)

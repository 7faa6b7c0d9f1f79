"""Labels of volumes that are predicted: on their file's own grid, in a folder of their own, nothing cut in silence."""

from __future__ import annotations

import csv
import gzip
import itertools
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_volume import ras, save, series, turned

from confrere.data import grid
from confrere.data.volume import read_labels, read_volume
from confrere.errors import DataError, RunError
from confrere.pictures import png
from confrere.predict_volumes import predict_volumes
from confrere.seeds import numpy_generator

SPACING = (1.0, 1.5, 2.0)
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


class Bright:
    """Labels what is brighter than the mean."""

    classes = ("background", "bright")

    def probabilities(self, seen: np.ndarray) -> np.ndarray:
        return np.stack([seen[..., 0] <= 0, seen[..., 0] > 0], axis=1).astype(np.float64)


def predict(source: Path, out: Path, size: tuple[int, int, int] = (16, 16, 16)) -> tuple[int, list[str], list[str]]:
    notes: list[str] = []
    model: Any = Bright()
    data = {"volume": {"size": size, "spacing": SPACING}}
    return *predict_volumes(model, data, source, out, note=notes.append), notes


def voxels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return 1 and 2, each of which is there."""
    found = numpy_generator(seed, "voxels").integers(1, 3, shape).astype(np.int16)
    found.flat[:2] = 1, 2
    return found


def mask(out: Path, number: int = 0) -> Any:
    return nibabel.load(out.with_name(f"{out.stem}_masks") / f"{number:04d}.nii.gz")


def tilted(degrees: float, spacing: tuple[float, ...] = SPACING) -> np.ndarray:
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return np.asarray(turn @ ras(spacing))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ORIENTATIONS), st.tuples(*[st.integers(3, 12)] * 3), st.floats(-15, 15), st.integers(0, 10**6))
def test_a_mask_has_the_shape_and_affine_of_its_file_and_each_voxel_its_place(
    orientation: Any, shape: tuple[int, int, int], degrees: float, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save(folder / "a.nii", *turned(voxels(shape, seed), tilted(degrees), *orientation))
        assert predict(source, folder / "out.csv") == (1, [], [])
        image, found = nibabel.load(source), mask(folder / "out.csv")
        assert found.shape == image.shape
        np.testing.assert_array_equal(found.affine, image.affine)
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(image.dataobj) == 2)
        path = folder / "out_masks" / "0000.nii.gz"
        volume = read_volume(source)
        np.testing.assert_array_equal(read_labels(path, 2, volume), volume.voxels == 2)


def test_a_mask_of_a_series_runs_along_columns_rows_and_slices(tmp_path: Path) -> None:
    """Slices by their place, not by their name; rows of voxels are those of the pictures."""
    from pydicom import dcmread

    (tmp_path / "in").mkdir()
    folder = series(tmp_path / "in" / "s")
    assert predict(tmp_path / "in", tmp_path / "out.csv") == (1, [], [])
    slices = sorted(map(dcmread, folder.iterdir()), key=lambda one: one.ImagePositionPatient[2])
    stack = np.stack([one.pixel_array.T for one in slices], axis=2)
    found = mask(tmp_path / "out.csv")
    labels = np.asarray(found.dataobj)
    assert labels.shape == stack.shape == (5, 6, 7)
    assert stack[labels == 1].min() > stack[labels == 0].max()
    np.testing.assert_allclose(found.affine[:3, 3], [-30, 20, 5], atol=1e-5)  # of the first pixel of the first slice
    with (tmp_path / "out.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["s"]


def test_what_the_grid_cuts_off_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save(folder / "a.nii", voxels((8, 9, 10)), ras())
    halves = np.repeat([1, 2], 10)[:, None, None] * np.ones((20, 9, 10))
    save(folder / "b.nii", halves.astype(np.int16), ras())
    count, problems, notes = predict(folder, tmp_path / "out.csv")
    assert (count, problems) == (2, [])
    assert len(notes) == 1
    assert notes[0].startswith("1 of 2 volumes reach beyond data.volume.size")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["outside the grid ml"]) for row in rows] == [0, pytest.approx(4 * 90 * 3 / 1000)]
    assert float(rows[1]["bright ml"]) == pytest.approx(8 * 90 * 3 / 1000), "two layers of the ten were not looked at"


def test_a_link_out_of_the_folder_is_left_out_and_one_inside_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save(tmp_path / "secret.nii", voxels((8, 9, 10)), ras())
    save(folder / "a.nii", voxels((8, 9, 10)), ras())
    (folder / "b.nii").symlink_to(tmp_path / "secret.nii")
    (folder / "c.nii").symlink_to(folder / "a.nii")
    assert predict(folder, tmp_path / "out.csv")[:2] == (2, ["b.nii: link leading out of the folder"])
    with (tmp_path / "out.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a.nii", "c.nii"]
    (tmp_path / "given.nii").symlink_to(tmp_path / "secret.nii")
    assert predict(tmp_path / "given.nii", tmp_path / "out.csv")[:2] == (1, []), "what is given itself is meant"


def test_a_smaller_prediction_leaves_nothing_of_a_larger_one(tmp_path: Path) -> None:
    folder, masks = tmp_path / "in", tmp_path / "out_masks"
    folder.mkdir()
    for number in range(3):
        save(folder / f"{number}.nii", voxels((8, 9, 10), number), ras())
    predict(folder, tmp_path / "out.csv")
    assert len(list(masks.iterdir())) == 3
    (folder / "0.nii").unlink()
    predict(folder, tmp_path / "out.csv")
    assert sorted(path.name for path in masks.iterdir()) == ["0000.nii.gz", "0001.nii.gz"]
    np.testing.assert_array_equal(np.asarray(mask(tmp_path / "out.csv").dataobj), voxels((8, 9, 10), 1) == 2)
    before = {path: path.read_bytes() for path in [*masks.iterdir(), tmp_path / "out.csv"]}
    (folder / "1.nii").write_text("rubbish")
    (folder / "2.nii").write_text("rubbish")
    with pytest.raises(DataError, match="none of the files"):
        predict(folder, tmp_path / "out.csv")
    assert {path: path.read_bytes() for path in before} == before, "what failed changed nothing"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.csv", "out_masks"}


def test_nothing_stays_of_an_earlier_prediction_of_pictures(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii", voxels((8, 9, 10)), ras())
    for kind in ("masks", "overlays"):
        (tmp_path / f"out_{kind}").mkdir()
        (tmp_path / f"out_{kind}" / "0000.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    predict(source, tmp_path / "out.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"a.nii", "out.csv", "out_masks"}
    assert [path.name for path in (tmp_path / "out_masks").iterdir()] == ["0000.nii.gz"]


@pytest.mark.parametrize("kind", ["another's mask", "edited", "notes", "zipped notes", "cut", "folder", "link"])
def test_what_was_not_predicted_is_never_removed(tmp_path: Path, kind: str) -> None:
    source = save(tmp_path / "a.nii", voxels((8, 9, 10)), ras())
    masks = tmp_path / "out_masks"
    predict(source, tmp_path / "out.csv")
    theirs = masks / "0001.nii.gz"
    if kind == "another's mask":
        save(theirs, voxels((8, 9, 10)), ras())
    elif kind == "notes":
        theirs.write_text("notes")
    elif kind == "zipped notes":
        theirs.write_bytes(gzip.compress(bytes(range(150)) + grid.MADE_HERE + bytes(200)))
    elif kind == "edited":
        image = nibabel.load(masks / "0000.nii.gz")
        image.header["descrip"] = grid.MADE_HERE + b", edited"
        nibabel.save(image, theirs)
    elif kind == "cut":
        theirs.write_bytes((masks / "0000.nii.gz").read_bytes()[:40])
    elif kind == "folder":
        theirs.mkdir()
    else:
        theirs.symlink_to(masks / "0000.nii.gz")
    before = sorted(path.name for path in masks.iterdir())
    with pytest.raises(DataError, match="not empty") as caught:
        predict(source, tmp_path / "out.csv")
    assert caught.value.code == "not-empty"
    assert sorted(path.name for path in masks.iterdir()) == before


def test_a_place_that_cannot_be_written_and_a_folder_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.nii", voxels((8, 9, 10)), ras())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        predict(tmp_path / "a.nii", tmp_path / "file" / "out.csv")
    monkeypatch.chdir(series(tmp_path / "s"))
    assert predict(Path(), tmp_path / "out.csv")[0] == 1
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("s,")

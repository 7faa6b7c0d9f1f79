"""Sites with volumes: read from folders and tables, laid on a grid, cached, refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_files import hospitals, save

from confrere.data.federation import Federation, load_federation
from confrere.data.grid import nifti_bytes
from confrere.data.options import DataOptions, Grid
from confrere.data.volume import prepared_labels, read_labels, read_volume, restored
from confrere.errors import DataError
from confrere.seeds import numpy_generator

GRID = Grid(size=(16, 16, 16))
OPTIONS = DataOptions(target="mask", volume=GRID, val=0.2, test=0.2)


def load(path: Path, cache: Path, options: DataOptions = OPTIONS) -> Federation:
    return load_federation(path, options=options, image_size=(8, 8), seed=0, cache=cache)


def test_volumes_and_labels_lie_on_one_grid(tmp_path: Path) -> None:
    data = load(hospitals(tmp_path / "data"), tmp_path / "cache")
    assert (data.classes, data.image_size, data.tabular) == (("background", "foreground"), (16, 16, 16), False)
    site = data.site("north")
    assert site.images.shape == (6, 16, 16, 16, 1)
    assert site.targets is not None
    for row in range(6):
        image, label = site.images[np.array([row])][0, ..., 0], site.targets[np.array([row])][0]
        assert label.max() == 1
        assert image[label == 1].min() > image[(label == 0) & (image > image.min())].mean()
    again = load(tmp_path / "data", tmp_path / "cache")
    assert again.digest == data.digest
    np.testing.assert_array_equal(again.site("south").images[np.arange(6)], data.site("south").images[np.arange(6)])


def test_a_table_says_the_same_as_folders(tmp_path: Path) -> None:
    folder = hospitals(tmp_path / "data")
    lines = ["path,mask,site,patient"]
    for path in sorted(folder.rglob("images/*")):
        site = path.parent.parent.name
        lines.append(f"{site}/images/{path.name},{site}/masks/{path.name},{site},{path.name.split('__')[0]}")
    (folder / "all.csv").write_text("\n".join(lines) + "\n")
    one, other = load(folder, tmp_path / "cache"), load(folder / "all.csv", tmp_path / "cache")
    assert [site.digests for site in one.sites] == [site.digests for site in other.sites]
    np.testing.assert_array_equal(one.site("north").groups, other.site("north").groups)


def test_what_cannot_be_used_is_left_out_by_name(tmp_path: Path) -> None:
    folder = hospitals(tmp_path / "data")
    north = folder / "north"
    (north / "images" / "p00__1.nii.gz").write_bytes(b"no volume")
    (north / "masks" / "p01__1.nii.gz").unlink()
    save(north / "masks" / "p02__1.nii.gz", np.full((15, 16, 14), 7))
    save(north / "masks" / "p03__1.nii.gz", np.ones((15, 16, 13)))
    for cache in ("cache", "cache"):  # found again, and made anew
        data = load(folder, tmp_path / cache)
        assert data.sheet["sites"]["north"]["bad_files"] == {
            "not a NIfTI file": 1,
            "the image has no mask": 1,
            "mask: a label is not one of the classes": 1,
            "mask: labels and image are not on the same grid": 1,
        }
        assert len(data.site("north").labels) == 2
    for path in (tmp_path / "cache").glob("*.json"):
        path.write_text("{}")
    assert load(folder, tmp_path / "cache").digest == data.digest


def test_no_usable_volume_is_refused(tmp_path: Path) -> None:
    folder = hospitals(tmp_path / "data")
    for path in (folder / "north" / "masks").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no usable image at north"):
        load(folder, tmp_path / "cache")


def test_labels_of_classes_that_were_not_named_are_asked_for(tmp_path: Path) -> None:
    folder = hospitals(tmp_path / "data")
    for path in (folder / "north" / "masks").iterdir():
        save(path, np.full((15, 16, 14), 2))
    with pytest.raises(DataError, match="mask: a label is not one of the classes: 6") as caught:
        load(folder, tmp_path / "cache")
    assert "data.classes" in str(caught.value.fix)


def test_without_masks_volumes_are_images(tmp_path: Path) -> None:
    data = load(hospitals(tmp_path / "data"), tmp_path / "cache", DataOptions(target="image", volume=GRID))
    assert data.classes == ("all",)
    assert data.site("north").targets is None


@pytest.mark.parametrize("change", [{"target": "label"}, {"image_size": (16, 16)}, {"volume": {"size": (4, 16, 16)}}])
def test_options_that_do_not_go_together_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"volume|greater"):
        DataOptions.model_validate({"target": "mask", "volume": {"size": (16, 16, 16)}, **change})


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(3, 12)] * 3), st.tuples(*[st.sampled_from([0.5, 1.0, 1.7])] * 3), st.integers(0, 99))
def test_labels_go_back_to_where_they_came_from(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int
) -> None:
    """A voxel of the volume gets the label of the grid's voxel whose centre is nearest, by a slow search."""
    grid, size = (1.0, 1.0, 1.0), (8, 9, 7)
    labels = numpy_generator(seed, "labels").integers(0, 5, size).astype(np.uint8)
    found, outside = restored(labels, shape, spacing, grid)
    missed = 0
    there = [max(1, round(n * s / g)) for n, s, g in zip(shape, spacing, grid, strict=True)]
    for place in np.ndindex(*shape):
        at = []
        for axis in range(3):
            millimetres = (place[axis] - (shape[axis] - 1) / 2) * spacing[axis]
            centres = (np.arange(size[axis]) - (size[axis] - there[axis]) // 2 - (there[axis] - 1) / 2) * grid[axis]
            distance = np.abs(centres - millimetres)
            at.append(
                int(np.flatnonzero(distance <= distance.min() + 1e-9).max()) if distance.min() <= 0.5 + 1e-9 else -1
            )
        assert found[place] == (labels[tuple(at)] if min(at) >= 0 else 0)
        missed += min(at) < 0
    assert outside == missed


def test_a_round_trip_at_one_spacing_changes_nothing(tmp_path: Path) -> None:
    labels = numpy_generator(0, "trip").integers(0, 3, (9, 11, 8)).astype(np.uint8)
    there = prepared_labels(labels, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (16, 16, 16))
    found, outside = restored(there, labels.shape, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(found, labels)
    assert outside == 0
    save(tmp_path / "image.nii.gz", labels + numpy_generator(1, "trip").random(labels.shape))
    volume = read_volume(tmp_path / "image.nii.gz")
    (tmp_path / "labels.nii.gz").write_bytes(nifti_bytes(labels, volume.affine))
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii.gz", 3, volume), labels)

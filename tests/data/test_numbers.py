"""Tables of numbers: what is read, what is refused, and that no statistic crosses sites or looks at test rows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from confrere.config import validate
from confrere.data.check import check
from confrere.data.federation import Federation, load_federation
from confrere.data.numbers import holds_numbers, read_numbers, standardise
from confrere.data.options import DataOptions, Partition
from confrere.errors import ConfigError, DataError
from confrere.job import open_data

NAN = float("nan")


def write(path: Path, rows: list[list[object]], header: tuple[str, ...] = ("site", "label", "age", "ca")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def hospitals(path: Path, *, shift: float = 0.0, reverse: bool = False) -> Path:
    rng = np.random.default_rng(0)
    rows: list[list[object]] = []
    for index in range(80):
        site, sick = ("north", "south")[index % 2], index % 4 < 2
        age = round(float(rng.normal(60 if sick else 45, 5)) + (shift if site == "south" else 0), 2)
        rows.append([site, "sick" if sick else "well", age, "?" if site == "south" or index % 5 == 0 else index % 3])
    return write(path, rows[::-1] if reverse else rows)


def load(path: Path, tmp: Path, **options: object) -> Federation:
    return load_federation(
        path, options=DataOptions(**options), image_size=(8, 8), seed=0, cache=tmp / "cache", splits=None
    )


def test_standardise_by_hand() -> None:
    """Training rows 1, 3 and a gap: median 2, mean 2, sd 1; the test row 5 is 3 sd away and moves nothing."""
    rows = np.array([[[1.0]], [[3.0]], [[NAN]], [[5.0]]], dtype=np.float32)
    found = standardise(rows, np.array([True, True, True, False]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 0], [[-1, 0], [1, 0], [0, 1], [3, 0]])


def test_a_gap_takes_the_median_and_not_the_mean() -> None:
    rows = np.array([[[0.0]], [[0.0]], [[6.0]], [[NAN]]], dtype=np.float32)  # mean 2, sd sqrt(8), median 0
    found = standardise(rows, np.array([True, True, True, False]))
    assert found[3, 0, 0] == pytest.approx(-2 / 8**0.5)


def test_columns_without_values_or_spread_and_far_values() -> None:
    rows = np.array([[[NAN, 4.0, 0.0]], [[NAN, 4.0, 1.0]], [[9.0, 5.0, 1000.0]]], dtype=np.float32)
    found = standardise(rows, np.array([True, True, False]))
    np.testing.assert_array_equal(found[:, 0, 0], 0)  # a site that never measured it
    np.testing.assert_array_equal(found[:, 0, 1], [0, 0, 1])  # constant: centred only
    assert found[2, 0, 2] == 10
    assert np.isfinite(found).all()


def test_given_constants_replace_the_sites_own() -> None:
    rows = np.array([[[1.0, 1.0]], [[3.0, 3.0]]], dtype=np.float32)
    found = standardise(rows, np.array([True, True]), ("a", "b"), {"a": (0.0, 2.0)})
    np.testing.assert_array_equal(found[:, 0, :2], [[0.5, -1], [1.5, 1]])


def test_a_federation_of_numbers(tmp_path: Path) -> None:
    found = load(hospitals(tmp_path / "heart.csv"), tmp_path)
    assert found.tabular
    assert (found.classes, found.image_size, found.name) == (("sick", "well"), (1, 4), "heart")
    for site in found.sites:
        values = np.asarray(site.images[:])[:, 0]
        assert values.shape == (40, 4)
        train = site.split == 0
        assert abs(values[train, 0].mean()) < 1e-5
        assert values[train, 0].std() == pytest.approx(1, abs=1e-4)
        assert {0, 1, 2} == set(site.split.tolist())
    np.testing.assert_array_equal(np.asarray(found.site("south").images[:])[:, 0, 3], 1)
    assert found.sheet["sites"]["south"]["missing_values"] == "50%"
    assert "channel_mean" not in found.sheet["sites"]["south"]


def test_another_sites_numbers_change_nothing_here(tmp_path: Path) -> None:
    """Fitted on pooled data, a shift of one hospital would move the other's rows, too."""
    plain = load(hospitals(tmp_path / "a.csv"), tmp_path)
    moved = load(hospitals(tmp_path / "b.csv", shift=40), tmp_path)
    np.testing.assert_array_equal(plain.site("north").images, moved.site("north").images)


def test_the_order_of_the_rows_does_not_matter_and_equal_rows_are_two_patients(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = load(hospitals(tmp_path / "one" / "t.csv"), tmp_path)
    two = load(hospitals(tmp_path / "two" / "t.csv", reverse=True), tmp_path)
    assert one.digest == two.digest
    np.testing.assert_array_equal(one.site("north").images, two.site("north").images)
    rows = [["a", label, 1, 2] for label in ("x", "y") for _ in range(6)]
    same = load(write(tmp_path / "same.csv", rows), tmp_path)
    assert len(set(same.site("a").digests)) == 12


def test_patients_stay_in_one_split(tmp_path: Path) -> None:
    rows = [["a", ("x", "y")[i // 3 % 2], i, i * i, f"p{i // 3}"] for i in range(60)]
    path = write(tmp_path / "t.csv", rows, ("site", "label", "age", "ca", "patient"))
    site = load(path, tmp_path).site("a")
    for group in set(site.groups.tolist()):
        assert len(set(site.split[site.groups == group].tolist())) == 1
    assert len(set(site.groups.tolist())) == 20


def test_splits_and_partitions_of_the_table(tmp_path: Path) -> None:
    rows = [
        ["x" if i % 2 else "y", i, ("train", "val", "test")[i % 3], "north" if i < 30 else "south"] for i in range(60)
    ]
    path = write(tmp_path / "t.csv", rows, ("label", "age", "split", "region"))
    found = load(path, tmp_path, partition=Partition(by="attribute", column="region"))
    assert [site.name for site in found.sites] == ["north", "south"]
    assert found.image_size == (1, 2)  # neither split nor region is a feature
    assert [int((found.site("north").split == i).sum()) for i in range(3)] == [10, 10, 10]


@pytest.mark.parametrize("cell", ["high", "inf", "1e39", "12,5"])
def test_what_is_no_number_is_refused_by_line(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path / "t.csv", [["a", "x", 1, 2], ["a", "y", 3, cell]])
    with pytest.raises(DataError, match="line 3: ca is no number"):
        read_numbers(path, DataOptions())


def test_tables_of_images_are_not_taken_for_numbers(tmp_path: Path) -> None:
    images = write(tmp_path / "i.csv", [["a", "x", "1.png", 7]], ("site", "label", "path", "age"))
    typo = write(tmp_path / "j.csv", [["a", "x", "1.png"]], ("site", "label", "file"))
    assert not holds_numbers(images, DataOptions())
    assert not holds_numbers(typo, DataOptions())
    assert not holds_numbers(tmp_path / "absent.csv", DataOptions())
    with pytest.raises(DataError, match="path"):
        load(typo, tmp_path)


def test_wrong_constants_are_refused(tmp_path: Path) -> None:
    path = hospitals(tmp_path / "t.csv")
    for constants in ({"weight": (0.0, 1.0)}, {"age": (50.0, 0.0)}, {"age": (NAN, 1.0)}):
        with pytest.raises(DataError, match=r"data\.constants"):
            load(path, tmp_path, constants=constants)


def test_the_check_knows_numbers(tmp_path: Path) -> None:
    report = check(hospitals(tmp_path / "t.csv"), DataOptions())
    assert report["ok"]
    assert report["sheet"]["sites"]["north"]["original_width"] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "backbone.name=mlp"), ({"backbone": {"name": "mlp"}, "train": {"views": 2}}, "orientation")],
)
def test_a_choice_that_does_not_fit_numbers_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    experiment = validate({"path": str(hospitals(tmp_path / "t.csv")), **changes})
    with pytest.raises(ConfigError, match=message):
        open_data(experiment, tmp_path / "out")


def test_a_network_for_numbers_is_refused_on_images(tmp_path: Path) -> None:
    experiment = validate({"path": str(tmp_path), "backbone": {"name": "mlp"}})
    with pytest.raises(ConfigError, match="mlp reads rows of numbers, the data are images"):
        open_data(experiment, tmp_path / "out")

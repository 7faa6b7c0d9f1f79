"""Boxes: read from tables, drawn around masks, cut and turned as their images are; what will not do is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from confrere.data import boxes
from confrere.data.boxes import MANY, OUTSIDE, UNNAMED, around, boxes_of, cut, uncut
from confrere.data.federation import Federation, load_federation
from confrere.data.masks import OTHER_SIZE
from confrere.data.options import DataOptions
from confrere.errors import DataError
from confrere.seeds import numpy_generator
from confrere.tokenset import TokenSet, oriented, turned

SIZE = (16, 16)


def read(path: Path, cache: Path, **options: object) -> Federation:
    chosen = DataOptions(target="boxes", **options)  # type: ignore[arg-type]
    return load_federation(path, options=chosen, image_size=SIZE, seed=0, cache=cache)


def write(folder: Path, cells: list[str], size: tuple[int, int] = (20, 24)) -> Path:
    """Write a table with one image a cell of boxes, all at one site."""
    lines = ["path,boxes,site,patient"]
    for i, cell in enumerate(cells):
        pixels = numpy_generator(i, "box files").integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f'{i}.png,"{cell}",north,p{i}')
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder / "t.csv"


GOOD = ["2 0 22 20 nodule", "", "3 3 9 9 nodule; 10 10 14.5 20 small mass", "2 2 12 12 nodule", "4 4 8 8 nodule"]


def test_boxes_of_a_table_lie_where_the_model_sees_them(tmp_path: Path) -> None:
    federation = read(write(tmp_path, GOOD), tmp_path / "cache")
    assert federation.classes == ("background", "nodule", "small mass")
    site = federation.sites[0]
    assert site.targets is not None
    assert site.targets.shape == (5, 2, 5)
    rows = np.asarray(site.targets[np.arange(5)]).astype(np.float64)
    found = {tuple(np.round(row[row[:, 4] > 0].ravel(), 4).tolist()) for row in rows}
    # 24 x 20 is cut to the middle 20 x 20, and 16 pixels show 20.
    assert (0.0, 0.0, 1.0, 1.0, 1.0) in found
    assert () in found
    assert (0.05, 0.15, 0.35, 0.45, 1.0, 0.4, 0.5, 0.625, 1.0, 2.0) in found
    other = tmp_path / "other"
    other.mkdir()
    changed = read(write(other, ["2 0 22 19 nodule", *GOOD[1:]]), tmp_path / "cache")
    assert changed.digest != federation.digest


@pytest.mark.parametrize(
    "cell",
    ["1 2 3", "1 2 3 x nodule", "3 3 3 9 nodule", "9 3 3 9 nodule", "0 0 nan 4 a", "0 0 inf 4 a", "1_0 1 20 4 a"],
)
def test_a_cell_that_is_no_box_is_refused_by_line(tmp_path: Path, cell: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, [*GOOD, cell]), tmp_path / "cache")
    assert caught.value.code == "table-rows"
    assert "line 7" in caught.value.what
    assert cell not in str(caught.value)


def test_an_image_whose_boxes_will_not_do_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "MOST", 3)
    cells = [*GOOD, "5 5 30 9 nodule", "1 1 4 4", ";".join(["1 1 4 4 nodule"] * 4), "-0.5 0 24.5 9 nodule"]
    federation = read(write(tmp_path, cells), tmp_path / "cache")
    assert federation.sheet["sites"]["north"]["bad_files"] == {OUTSIDE: 1, UNNAMED: 1, MANY: 1}
    assert len(federation.sites[0].labels) == 6


def test_classes_are_agreed_and_mapped(tmp_path: Path) -> None:
    table = write(tmp_path, GOOD)
    agreed = ("background", "mass", "nodule")
    found = read(table, tmp_path / "c", classes=agreed, class_map={"small mass": "mass"})
    assert found.classes == agreed
    with pytest.raises(DataError, match="small mass") as caught:
        read(table, tmp_path / "c", classes=agreed)
    assert caught.value.code == "classes"
    with pytest.raises(DataError, match="first class") as caught:
        read(table, tmp_path / "c", classes=("nodule", "small mass"))
    assert caught.value.code == "classes"


def test_the_sheet_counts_boxes_and_the_images_that_have_one(tmp_path: Path) -> None:
    federation = read(write(tmp_path, GOOD), tmp_path / "c")
    site = federation.sites[0]
    assert site.targets is not None
    counts = federation.sheet["sites"]["north"]["boxes"]
    assert list(counts) == list(federation.classes[1:])
    for k, name in enumerate(federation.classes[1:], 1):
        each = [sum(box[4] == k for box in boxes) for boxes in site.targets[np.arange(len(site.labels))]]
        assert counts[name] == {"boxes": sum(each), "images": sum(n > 0 for n in each)}
    assert sum(count["boxes"] for count in counts.values()) > max(count["images"] for count in counts.values())
    assert "findings" not in federation.sheet["sites"]["north"]


def test_without_boxes_and_masks_the_column_is_missing(tmp_path: Path) -> None:
    table = write(tmp_path, GOOD)
    table.write_text(table.read_text().replace("boxes", "label", 1).replace(',"",', ',"x",'))
    with pytest.raises(DataError, match="the column 'boxes' is missing") as caught:
        read(table, tmp_path / "c")
    assert caught.value.code == "table-header"


def test_masks_become_boxes_around_connected_parts(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / "h" / "north" / part).mkdir(parents=True)
    for i in range(6):
        pixels = numpy_generator(i, "parts").integers(0, 255, (16, 16, 3)).astype(np.uint8)
        mask = np.zeros((16, 16) if i else (8, 8), np.uint8)
        mask[2:6, 1:5], mask[6, 5], mask[4:8, 7:8] = 1, 1, 2
        Image.fromarray(pixels).save(tmp_path / "h" / "north" / "images" / f"p{i}__x.png")
        Image.fromarray(mask).save(tmp_path / "h" / "north" / "masks" / f"p{i}__x.png")
    federation = read(tmp_path / "h", tmp_path / "cache", classes=("background", "a", "b"))
    targets = federation.sites[0].targets
    assert targets is not None
    wanted = np.array([[1, 2, 6, 7, 16], [7, 4, 8, 8, 32]]) / 16  # parts that touch at a corner are one
    np.testing.assert_allclose(targets[np.arange(5)], np.stack([wanted] * 5))
    assert federation.sheet["sites"]["north"]["bad_files"] == {OTHER_SIZE: 1}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_parts_are_those_of_a_slow_search(seed: int) -> None:
    mask = (numpy_generator(seed, "x").random((9, 11)) < 0.3).astype(np.uint8) * (1 + seed % 2)
    left, slow = {(int(y), int(x)) for y, x in np.argwhere(mask)}, set()
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        ys, xs = zip(*part, strict=True)
        slow.add((min(xs), min(ys), max(xs) + 1, max(ys) + 1, 1 + seed % 2))
    assert {tuple(row) for row in around(mask).tolist()} == slow


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([(16, 16), (16, 32), (24, 12)]), st.integers(0, 10_000))
def test_a_box_is_cut_as_its_image(height: int, width: int, size: tuple[int, int], seed: int) -> None:
    rng = numpy_generator(seed, "cut")
    y0, x0 = rng.integers(0, height - 3), rng.integers(0, width - 3)
    y1, x1 = rng.integers(y0 + 3, height + 1), rng.integers(x0 + 3, width + 1)
    pixels = np.zeros((height, width), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    seen = ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), method=Image.Resampling.NEAREST)
    drawn = np.argwhere(np.asarray(seen) > 0)
    found = cut(np.array([[x0, y0, x1, y1, 1.0]]), (height, width), size)
    if len(found):
        top, left = drawn.min(0)
        bottom, right = drawn.max(0) + 1
        ends = found[0, :4] * np.array([size[1], size[0]] * 2)
        np.testing.assert_allclose(ends, [left, top, right, bottom], atol=1.01)
        back = uncut(found.astype(np.float64), (height, width), size)[0, :4]
        inside = (back > [x0 - 1e-3, y0 - 1e-3, 0, 0]).all() and (back < [width, height, x1 + 1e-3, y1 + 1e-3]).all()
        assert inside
    else:
        assert not len(drawn) or min(np.ptp(drawn, axis=0) + 1) <= 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 7), st.integers(0, 10_000))
def test_boxes_turn_with_their_image(view: int, seed: int) -> None:
    rng = numpy_generator(seed, "turn")
    image = np.zeros((1, 12, 12, 1), np.uint8)
    y0, x0 = rng.integers(0, 10, 2)
    y1, x1 = rng.integers(y0 + 1, 13), rng.integers(x0 + 1, 13)
    image[0, y0:y1, x0:x1] = 1
    truth = np.full((1, 3, 5), -1, np.float32)
    truth[0, 0] = [x0 / 12, y0 / 12, x1 / 12, y1 / 12, 2]
    before = truth.copy()
    found = turned(truth, view)
    assert (truth == before).all(), "the input is not changed"
    pixels = np.argwhere(oriented(image, view)[0, ..., 0])
    low, high = pixels.min(0), pixels.max(0) + 1
    np.testing.assert_allclose(found[0, 0], [low[1] / 12, low[0] / 12, high[1] / 12, high[0] / 12, 2], atol=1e-6)
    assert (found[0, 1:] == -1).all()
    data = TokenSet(
        tokens=np.zeros((2, 1, 4), np.float32),
        views=(np.zeros((2, 1, 4), np.float32),) * 7,
        labels=np.zeros(2, np.int64),
        groups=np.arange(2),
        split=np.zeros(2, np.int8),
        classes=("background", "lesion"),
        truth=np.concatenate([truth, truth]),
    )
    both = data.targets(np.arange(2), np.array([0, view]))
    np.testing.assert_array_equal(both, np.concatenate([truth, found]))


def test_a_cell_reads_as_written() -> None:
    assert boxes_of(" ; 1 2 3 4 ;5 6 7.5 8 large mass ;") == ((1, 2, 3, 4, ""), (5, 6, 7.5, 8, "large mass"))

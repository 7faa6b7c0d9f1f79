"""Metrics of boxes against pycocotools and slow loops."""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confrere.errors import DataError
from confrere.metrics.bootstrap import draw
from confrere.metrics.boxes import (
    average_precision,
    evaluate_boxes,
    f1_of_images,
    iou,
    iou_of_images,
    matched,
    soft_f1,
)
from confrere.seeds import numpy_generator


def some_boxes(seed: int, images: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return found (N, 8, 6) and true boxes (N, 4, 5), on a grid so that overlaps and scores tie now and then."""
    rng = numpy_generator(seed, "boxes")
    truth, found = np.full((images, 4, 5), -1.0), np.full((images, 8, 6), -1.0)
    for i in range(images):
        for m in range(rng.integers(0, 5)):
            low, size = rng.integers(0, 6, 2), rng.integers(1, 5, 2)
            truth[i, m] = [*(low / 10), *((low + size) / 10), rng.integers(1, classes)]
        rows = []
        for _ in range(rng.integers(0, 9)):
            if rng.random() < 0.6 and (truth[i, :, 4] > 0).any():
                box = truth[i, rng.integers(0, (truth[i, :, 4] > 0).sum())].copy()
                box[:4] += rng.integers(-1, 2, 4) / 20
            else:
                low, size = rng.integers(0, 6, 2), rng.integers(1, 5, 2)
                box = np.array([*(low / 10), *((low + size) / 10), rng.integers(1, classes)])
            if box[2] > box[0] and box[3] > box[1]:
                rows.append([*box[:4], rng.integers(1, 20) / 20, box[4]])
        for place, row in enumerate(sorted(rows, key=lambda row: -row[4])):
            found[i, place] = row
    return found, truth


def coco(found: np.ndarray, truth: np.ndarray, classes: int) -> tuple[float, float]:
    """Return AP and AP50 as pycocotools has them."""
    tool = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")

    def rows(boxes: np.ndarray) -> list[dict[str, object]]:
        made: list[dict[str, object]] = []
        for i, one in enumerate(boxes, 1):
            for box in one[one[:, -1] > 0]:
                wide = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                made.append({"image_id": i, "category_id": int(box[-1]), "bbox": wide, "area": wide[2] * wide[3]})
                made[-1] |= {"id": len(made), "iscrowd": 0} | ({"score": box[4]} if len(box) == 6 else {})
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        base = tool.COCO()
        images = [{"id": i} for i in range(1, len(truth) + 1)]
        categories = [{"id": k} for k in range(1, classes)]
        base.dataset = {"images": images, "categories": categories, "annotations": rows(truth)}
        base.createIndex()
        other = tool.COCO()
        other.dataset = {"images": images, "categories": categories, "annotations": rows(found)}
        other.createIndex()
        judge = evaluation.COCOeval(base, other, "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][..., 0, -1]  # thresholds, recalls, classes
    precision = precision[:, :, [bool((truth[..., 4] == k).any()) for k in range(1, classes)]]
    return float(precision.mean()), float(precision[0].mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    found, truth = some_boxes(seed, 9)
    if not (truth[..., 4] > 0).any():
        return
    found, truth = found.copy(), truth.copy()
    found[..., :4] *= 100  # pycocotools' boxes are of pixels
    truth[..., :4] *= 100
    area = average_precision(found, truth, np.arange(9), np.ones((1, 9)), 3)[0]
    per_class = area[:, ~np.isnan(area[0])]
    assert (per_class.mean(), per_class[0].mean()) == pytest.approx(coco(found, truth, 3), abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_a_resample_is_a_data_set_with_patients_twice_or_not_at_all(seed: int) -> None:
    found, truth = some_boxes(seed, 8)
    found[..., 4] += np.arange(64).reshape(8, 8)[:, ::-1] / 10000  # the order of ties would be another
    patient = np.array([0, 0, 1, 2, 2, 3, 4, 4])
    weights = draw(5, numpy_generator(seed, "draw"), 6)
    together = average_precision(found, truth, patient, weights, 3)
    for row, one in zip(weights, together, strict=True):
        again = np.repeat(np.arange(8), row[patient].astype(int))
        slow = average_precision(found[again], truth[again], np.arange(len(again)), np.ones((1, len(again))), 3)[0]
        np.testing.assert_allclose(one, slow, atol=1e-12)


def slow_iou(a: np.ndarray, b: np.ndarray) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(wide, 0) * max(high, 0)
    return float(inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_scores_of_images_are_those_of_slow_loops(seed: int) -> None:
    found, truth = some_boxes(seed, 4)
    f1, overlap = f1_of_images(found, truth), iou_of_images(found, truth)
    for i in range(4):
        true = [box for box in truth[i] if box[4] > 0]
        mine = [box for box in found[i] if box[5] > 0 and box[4] >= 0.5]
        hits, left = 0, list(range(len(true)))
        for box in mine:
            able = [(slow_iou(box, true[m]), m) for m in left if true[m][4] == box[5]]
            if able and max(able)[0] >= 0.5:
                left.remove(max(able)[1])
                hits += 1
        assert f1[i] == pytest.approx(2 * hits / (len(true) + len(mine)) if true or mine else 1.0)
        best = [max([slow_iou(box, t) for box in mine if box[5] == t[4]], default=0.0) for t in true]
        assert overlap[i] == pytest.approx(np.mean(best) if best else np.nan, nan_ok=True)


def test_by_hand() -> None:
    """Two lesions; the best box is right, the second is none, the third is right: precision 1 up to half, then 2/3."""
    truth = np.array([[[0.0, 0.0, 0.2, 0.2, 1], [0.5, 0.5, 0.9, 0.9, 1]]])
    boxes = [[0.0, 0.0, 0.2, 0.2, 0.9, 1], [0.3, 0.3, 0.4, 0.4, 0.8, 1], [0.5, 0.5, 0.9, 0.9, 0.7, 1]]
    found = np.array([boxes])
    metrics, f1 = evaluate_boxes(
        found, truth, np.array([7]), classes=("background", "lesion"), generator=numpy_generator(0, "x"), resamples=20
    )
    assert metrics["ap50"]["value"] == metrics["ap"]["value"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert f1.tolist() == pytest.approx([2 * 2 / 5])
    assert metrics["box_f1"]["value"] == metrics["by_class"]["lesion"]["value"] == pytest.approx(0.8)
    assert (metrics["best_iou"]["value"], metrics["boxes"], metrics["box_f1"]["low"]) == (1.0, 2, None)


def test_nothing_to_find_and_nothing_found() -> None:
    none, box = np.full((3, 1, 5), -1.0), np.full((3, 2, 6), -1.0)
    assert f1_of_images(box, none).tolist() == [1.0] * 3
    assert soft_f1(box, none) == 1.0
    box[0, 0] = [0, 0, 1, 1, 0.8, 1]
    assert f1_of_images(box, none).tolist() == [0.0, 1.0, 1.0]
    assert soft_f1(box, none) == pytest.approx((0.2 + 2) / 3)
    metrics, _ = evaluate_boxes(box, none, np.arange(3), classes=("a", "b"), generator=numpy_generator(0, "x"))
    assert metrics["ap50"] == metrics["best_iou"] == {"value": None, "low": None, "high": None}
    assert metrics["notes"] == ["Test images without a true box: 3; they count in F1 alone."]


def test_the_smooth_score_rises_with_scores_and_overlaps() -> None:
    truth = np.array([[[0.2, 0.2, 0.6, 0.6, 1]]])
    values = [soft_f1(np.array([[[0.2 + d, 0.2, 0.6, 0.6, s, 1]]]), truth) for s, d in ((0.3, 0.1), (0.9, 0.1), (1, 0))]
    assert all(a < b for a, b in pairwise(values))
    assert values[-1] == 1.0
    assert matched(np.array([[[0.2, 0.2, 0.6, 0.6, 1, 2]]]), truth).sum() == 0, "of another class"
    assert iou(np.zeros((1, 1, 6)), np.zeros((1, 1, 5)))[0, 0, 0] == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        evaluate_boxes(
            np.zeros((2, 1, 6)),
            np.zeros((3, 1, 5)),
            np.arange(2),
            classes=("a", "b"),
            generator=numpy_generator(0, "x"),
        )
    assert caught.value.code == "metric-input"

"""Metrics of boxes with 95 % intervals over patients.

Shapes: N images, D found boxes an image, M true ones, T thresholds, K classes (0 is none), P patients, R resamples (row
0 is the sample). A true box is (x0, y0, x1, y1, class), a found one (x0, y0, x1, y1, score, class); class 0 or less
means that there is none. Found boxes are sorted by score, the highest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.errors import DataError
from confrere.metrics.bootstrap import Floats, Ints, draw, mean_defined, percentile, ratio
from confrere.metrics.masks import mean_of

THRESHOLDS = np.linspace(0.5, 0.95, 10)
OPERATING = 0.5
"""Score from which a box counts as found where no order of scores is asked for."""
_RECALLS = np.linspace(0.0, 1.0, 101)
_PART = 250
"""Resamples at once."""
Flags = NDArray[np.bool_]


def iou(one: Floats, two: Floats) -> Floats:
    """Return the intersection over union (..., D, M) of boxes (..., D, 4+) and (..., M, 4+); 0 where both are empty."""
    a, b = one[..., :, None, :4], two[..., None, :, :4]
    inner = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    areas = [np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1) for box in (a, b)]
    either = areas[0] + areas[1] - inner
    found: Floats = np.divide(inner, either, out=np.zeros_like(either), where=either > 0)
    return found


def matched(found: Floats, truth: Floats, thresholds: Floats = THRESHOLDS) -> Flags:
    """Return which found boxes (N, T, D) match a true one: greedily, by falling score, each true box once.

    A found box takes, of the true boxes of its class that are left, the one it overlaps most, if by ``thresholds`` or
    more; of equal ones the last. COCO's rule (Lin et al., ECCV 2014).
    """
    overlap = iou(found, truth)
    same = (found[:, :, None, 5] == truth[:, None, :, 4]) & (truth[:, None, :, 4] > 0)
    overlap = np.where(same, overlap, -1.0)
    N, D, M = overlap.shape
    free = np.ones((N, len(thresholds), M), bool)
    hit = np.zeros((N, len(thresholds), D), bool)
    for d in range(D):
        left = np.where(free, overlap[:, None, d], -1.0)
        best = M - 1 - left[..., ::-1].argmax(-1)
        hit[:, :, d] = np.take_along_axis(left, best[..., None], -1)[..., 0] >= thresholds
        taken = np.take_along_axis(free, best[..., None], -1) & ~hit[:, :, d, None]
        np.put_along_axis(free, best[..., None], taken, -1)
    return hit


def f1_of_images(found: Floats, truth: Floats, empty: float = 1.0) -> Floats:
    """Return the F1 (N,) of each image's boxes of score ``OPERATING`` or more, at an IoU of 0.5 or more.

    Twice the matches over both numbers of boxes; ``empty`` for an image without a true or a found box.
    """
    kept = chosen(found)
    hits = matched(kept, truth, THRESHOLDS[:1])[:, 0].sum(1)
    total = (kept[..., 5] > 0).sum(1) + (truth[..., 4] > 0).sum(1)
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), empty)


def iou_of_images(found: Floats, truth: Floats) -> Floats:
    """Return for each image (N,) how far its true boxes are overlapped at best, on average; NaN without any."""
    kept = chosen(found)
    same = kept[:, :, None, 5] == truth[:, None, :, 4]
    best = np.where(same, iou(kept, truth), 0.0).max(axis=1, initial=0.0)
    return mean_defined(np.where(truth[..., 4] > 0, best, np.nan))


def soft_f1(found: Floats, truth: Floats) -> float:
    """Return the mean over images of an F1 in which a match counts by its score and overlap; smooth, in 0..1."""
    hit = matched(found, truth, THRESHOLDS[:1])[:, 0]
    same = found[:, :, None, 5] == truth[:, None, :, 4]
    best = np.where(same, iou(found, truth), 0.0).max(axis=2, initial=0.0)
    scores = np.where(found[..., 5] > 0, found[..., 4], 0.0)
    true = (truth[..., 4] > 0).sum(1)
    values = ratio(2 * (scores * hit * best).sum(1), scores.sum(1) + true)
    return float(np.where(true > 0, values, 1 - scores.max(axis=1, initial=0.0)).mean())


def chosen(found: Floats) -> Floats:
    """Return found boxes, those below ``OPERATING`` blotted out."""
    return np.where(found[..., 4:5] >= OPERATING, found, -1.0)


def average_precision(found: Floats, truth: Floats, patient_N: Ints, weights: Floats, classes: int) -> Floats:
    """Return COCO's average precision (R, T, K - 1): mean precision at 101 recalls; NaN for a class without true boxes.

    Args:
        found: (N, D, 6).
        truth: (N, M, 5).
        patient_N: of each image, 0..P-1.
        weights: (R, P), how often each patient was drawn.
        classes: K.
    """
    hits, out = matched(found, truth), np.full((len(weights), len(THRESHOLDS), classes - 1), np.nan)
    for k in range(1, classes):
        image, place = np.nonzero(found[..., 5] == k)
        order = np.argsort(-found[image, place, 4], kind="stable")
        image, place = image[order], place[order]
        true_P = np.bincount(patient_N, weights=(truth[..., 4] == k).sum(1), minlength=weights.shape[1])
        for start in range(0, len(weights), _PART):
            rows = slice(start, start + _PART)
            each = weights[rows][:, patient_N[image]]
            so_far, true_R = each.cumsum(1), weights[rows] @ true_P
            for t in range(len(THRESHOLDS)):
                right = np.flatnonzero(hits[image, t, place])
                out[rows, t, k - 1] = _area(each[:, right].cumsum(1), so_far[:, right], true_R)
    return out


def _area(right: Floats, so_far: Floats, true_R: Floats) -> Floats:
    """Return the mean precision (R,) at 101 recalls, of counts of right and of all boxes at each right one (R, H)."""
    if not right.shape[1]:
        return np.where(true_R > 0, 0.0, np.nan)
    # A patient who was not drawn can come first: nothing of nothing.
    precision = np.maximum.accumulate(np.nan_to_num(ratio(right, so_far))[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(right), 1))], axis=1)
    recall = ratio(right, true_R[:, None])
    places = [np.searchsorted(row, _RECALLS, side="left") for row in np.nan_to_num(recall)]
    means = np.take_along_axis(precision, np.stack(places), 1).mean(1)
    return np.where(true_R > 0, means, np.nan)


def evaluate_boxes(
    found: Floats,
    truth: Floats,
    groups: Ints,
    *,
    classes: Sequence[str],
    generator: np.random.Generator,
    resamples: int = 1000,
) -> tuple[dict[str, Any], Floats]:
    """Return the metrics, ready for JSON, and the F1 (N,) of every image.

    Args:
        found: (N, D, 6).
        truth: (N, M, 5).
        groups: (N,) patient of each image.
        classes: K names, the background first.
        generator: source of the resamples.
        resamples: R.

    Returns:
        ``n``, ``patients``; ``box_f1`` and ``best_iou`` of images, see :func:`f1_of_images` and :func:`iou_of_images`;
        ``ap50`` and ``ap`` (COCO's, mean over classes and, for ``ap``, over IoU 0.50, 0.55, ..., 0.95); each
        ``{"value", "low", "high"}`` in 0..1; ``by_class``: F1 by class; ``boxes``: how many there are; ``notes``.

    Raises:
        DataError: shapes do not fit.
    """
    if found.shape[::2] != (len(groups), 6) or truth.shape[::2] != (len(groups), 5):
        raise DataError(
            f"found boxes {found.shape}, true ones {truth.shape} and groups {groups.shape} do not fit",
            where="evaluation",
            fix="give (N, D, 6), (N, M, 5) and (N,)",
            code="metric-input",
        )
    patient_N = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    weights = draw(int(patient_N.max(initial=-1)) + 1, generator, resamples)
    f1, overlap = f1_of_images(found, truth), iou_of_images(found, truth)
    area = average_precision(found, truth, patient_N, weights, len(classes))
    with_boxes = len(np.unique(patient_N[(truth[..., 4] > 0).any(1)]))

    def over(samples: Floats) -> dict[str, float | None]:
        return percentile(samples[0], samples[1:], with_boxes)

    out: dict[str, Any] = {"n": len(found), "patients": weights.shape[1], "boxes": int((truth[..., 4] > 0).sum())}
    out |= {"box_f1": mean_of(f1, patient_N, weights), "best_iou": mean_of(overlap, patient_N, weights)}
    out["by_class"] = {}
    out |= {"ap50": over(mean_defined(area[:, 0])), "ap": over(mean_defined(area.mean(1)))}
    for k, name in enumerate(classes[1:], 1):
        of_class = [np.where(boxes[..., -1:] == k, boxes, -1.0) for boxes in (found, truth)]
        out["by_class"][name] = mean_of(f1_of_images(of_class[0], of_class[1], np.nan), patient_N, weights)
    empty = int((~(truth[..., 4] > 0).any(1)).sum())
    out["notes"] = [f"Test images without a true box: {empty}; they count in F1 alone."] if empty else []
    return out, f1

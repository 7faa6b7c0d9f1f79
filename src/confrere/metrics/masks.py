"""Metrics of masks, of images or volumes, with 95 % intervals over patients.

Shapes: N images, K classes (0 is the background), H and W pixels, P patients. Every metric is computed for each image
and class of the foreground that the image's mask holds, averaged over these classes, then over images.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from confrere.errors import DataError, MissingExtraError
from confrere.metrics.bootstrap import Estimate, Floats, Ints, draw, mean_defined, per_patient, percentile, ratio

PART = 64
"""Images at once: distances take memory."""
_QUIET = threading.Lock()  # which warnings are shown is the whole process's


def evaluate_masks(
    guess: np.ndarray,
    truth: np.ndarray,
    groups: Ints,
    *,
    classes: Sequence[str],
    generator: np.random.Generator,
    resamples: int = 1000,
) -> tuple[dict[str, Any], Floats]:
    """Return the metrics, ready for JSON, and the Dice (N,) of every image (NaN without foreground in its mask).

    Args:
        guess: (N, H, W) or (N, X, Y, Z) predicted classes.
        truth: true ones, of that shape.
        groups: (N,) patient of each image.
        classes: K names.
        generator: source of the resamples.
        resamples: R.

    Returns:
        ``n``, ``patients``; ``dice`` and ``iou``; ``hd95``, the 95th percentile of the distances between outlines in
        units of the image's diagonal (1 where nothing was predicted); ``box_iou`` of the boxes around all pixels of a
        class; each ``{"value", "low", "high"}`` in 0..1; ``by_class``: Dice by class; ``notes``.

    Raises:
        DataError: shapes differ or a class is unknown.
        MissingExtraError: MONAI is not installed.
    """
    if guess.shape != truth.shape or guess.ndim not in (3, 4) or groups.shape != guess.shape[:1]:
        raise DataError(
            f"masks {guess.shape} and {truth.shape} and groups {groups.shape} do not fit",
            where="evaluation",
            fix="give (N, H, W) or (N, X, Y, Z) twice and (N,)",
            code="metric-input",
        )
    parts = [_of_images(guess[i : i + PART], truth[i : i + PART], len(classes)) for i in range(0, len(guess), PART)]
    names = ("dice", "iou", "hd95", "box_iou")
    values = {
        name: np.concatenate([part[name] for part in parts]) if parts else np.zeros((0, len(classes) - 1))
        for name in names
    }
    patient_N = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    weights = draw(int(patient_N.max(initial=-1)) + 1, generator, resamples)
    out: dict[str, Any] = {"n": len(guess), "patients": weights.shape[1]}
    by_image = {name: mean_defined(value) for name, value in values.items()}
    out |= {name: mean_of(value, patient_N, weights) for name, value in by_image.items()}
    dice = values["dice"]
    out["by_class"] = {name: mean_of(dice[:, k], patient_N, weights) for k, name in enumerate(classes[1:])}
    empty = int(np.isnan(by_image["dice"]).sum())
    out["notes"] = [f"{empty} test masks hold background only and are left out."] if empty else []
    return out, by_image["dice"]


def mean_of(values_N: Floats, patient_N: Ints, weights: Floats) -> Estimate:
    """Return the mean over images of what is defined, with its interval over resampled patients."""
    known = ~np.isnan(values_N)
    shape = (weights.shape[1], 1)
    zeros = np.zeros(int(known.sum()), np.int64)
    sums = per_patient(patient_N[known], zeros, shape, values_N[known])
    images = per_patient(patient_N[known], zeros, shape)
    samples = ratio(weights @ sums, weights @ images)[:, 0]
    return percentile(samples[0], samples[1:], int((images > 0).sum()))


def _of_images(guess: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, Floats]:
    """Return every metric (N, K - 1); NaN where a class is not in the true mask."""
    import torch

    try:
        from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    except ImportError as error:
        raise MissingExtraError("monai", "volumes", needed_for="the metrics of masks") from error
    one, two = (np.stack([mask == k for k in range(classes)], axis=1) for mask in (guess, truth))
    space = tuple(range(2, one.ndim))
    both, either = (one & two).sum(space), (one | two).sum(space)
    there, found = two.any(space), one.any(space)
    distance = np.ones(there.shape)
    known = there & found
    if known.any():
        pair = [torch.from_numpy(masks[known][:, None]).float() for masks in (one, two)]
        with _QUIET, warnings.catch_warnings():  # MONAI calls a function of its own in a way it deprecated
            warnings.simplefilter("ignore", FutureWarning)
            reach = compute_hausdorff_distance(pair[0], pair[1], include_background=True, percentile=95)
        distance[known] = reach[:, 0].numpy() / np.linalg.norm(guess.shape[1:])
    values = {
        "dice": ratio(2.0 * both, both + either + 0.0),
        "iou": ratio(both + 0.0, either + 0.0),
        "hd95": np.clip(distance, 0.0, 1.0),
        "box_iou": _box_iou(one, two),
    }
    return {name: np.where(there, value, np.nan)[:, 1:] for name, value in values.items()}


def _box_iou(one: np.ndarray, two: np.ndarray) -> Floats:
    """Return the intersection over union (N, K) of the boxes around two sets of masks (N, K, ...); 0 without one."""
    low1, high1 = _boxes(one)
    low2, high2 = _boxes(two)
    inner = np.clip(np.minimum(high1, high2) - np.maximum(low1, low2), 0, None).prod(-1)
    return ratio(inner, (high1 - low1).prod(-1) + (high2 - low2).prod(-1) - inner)


def _boxes(masks: np.ndarray) -> tuple[Floats, Floats]:
    """Return first and one past last row and column (N, K, 2 or 3) of each mask; zeros for an empty one."""
    ends, space = [], range(2, masks.ndim)
    for axis in space:
        line: np.ndarray = np.any(masks, axis=tuple(other for other in space if other != axis))
        first, last = line.argmax(-1), line.shape[-1] - line[..., ::-1].argmax(-1)
        some = line.any(-1)
        ends.append((np.where(some, first, 0), np.where(some, last, 0)))
    low, high = (np.stack(side, axis=-1).astype(np.float64) for side in zip(*ends, strict=True))
    return low, high

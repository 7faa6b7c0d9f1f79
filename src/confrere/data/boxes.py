"""Boxes around lesions: read from a table or drawn around masks, and moved and clipped as their image is cut.

Coordinates: left, top, right, bottom; in a table in pixels of the file as it is seen upright, afterwards in 0..1 of
what the model sees. Shapes: N images of a site, ``most`` boxes in one image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from confrere.data.cache import Fact, workers
from confrere.data.findings import refuse_unknown
from confrere.data.masks import DEFAULT_CLASSES, decoded_mask, read_mask
from confrere.data.options import DataOptions
from confrere.data.register import Registration, SiteFiles, only
from confrere.data.sources import Box, Listing, Problem, Row, names_of
from confrere.errors import DataError

OUTSIDE = "a box lies outside of its image"
UNNAMED = "a box has no class"
MANY = "more boxes than an image may hold"
MOST = 500
_SLACK = 1.0  # pixels by which tools overshoot an edge


def boxes_of(cell: str) -> tuple[Box, ...]:
    """Return the boxes of a cell: ``x0 y0 x1 y1 class`` between semicolons; a missing class is "".

    Raises:
        ValueError: a box has less than four numbers, or no area.

    >>> boxes_of("10 20 30.5 40 nodule; 0 0 5 5 small mass")
    ((10.0, 20.0, 30.5, 40.0, 'nodule'), (0.0, 0.0, 5.0, 5.0, 'small mass'))
    """
    found = []
    for part in cell.split(";"):
        words = part.split(maxsplit=4)
        if not words:
            continue
        try:
            x0, y0, x1, y1 = (float(word.replace("_", " ")) for word in words[:4])
        except ValueError:
            raise ValueError("a box is not: x0 y0 x1 y1 class") from None
        if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
            raise ValueError("a box has no area")
        found.append((x0, y0, x1, y1, words[4].strip() if len(words) > 4 else ""))
    return tuple(found)


def names(listing: Listing, options: DataOptions) -> tuple[str, ...]:
    """Return the classes, the background first: as agreed, or those that the boxes name; of masks the default ones.

    Raises:
        DataError: a box has a class that was not agreed, or that of the background.
    """
    found = sorted({name for row in listing.rows if row.boxes is not None for name in names_of(row)} - {""})
    agreed = options.classes or listing.classes
    refuse_unknown(found, agreed, listing.name)
    if agreed and agreed[0] in found:
        what, fix = f"boxes are called {agreed[0]!r}, the first class", 'begin data.classes with "background"'
        raise DataError(what, where=listing.name, fix=fix, code="classes")
    return agreed or (("background", *found) if found else DEFAULT_CLASSES)


def with_boxes(
    registration: Registration, classes: Sequence[str], size: tuple[int, int], *, max_pixels: int
) -> Registration:
    """Return the registration with the boxes of all images, and without the images whose boxes will not do.

    Args:
        registration: of images.
        classes: K names, the background first.
        size: (height, width) in pixels, that of the decoded images.
        max_pixels: a mask with more is not decoded.

    Returns:
        Targets (N, most, 5) float32 for every site: a box in 0..1 of the model's image and its class 1..K-1, or five
        times -1. Boxes that the cut leaves less than a pixel of the model's image wide or high are left out.
    """
    problems, read = list(registration.problems), []
    for site in registration.sites:
        pairs = list(zip(site.rows, site.entry.facts, strict=True))
        with ThreadPoolExecutor(workers()) as pool:
            read.append(list(pool.map(lambda pair: _read(pair[0], pair[1], classes, size, max_pixels), pairs)))
    usable = [boxes for found in read for boxes, _ in found if not isinstance(boxes, str)]
    most = max([1, *map(len, usable)])
    sites = []
    for site, found in zip(registration.sites, read, strict=True):
        for row, (boxes, _) in zip(site.rows, found, strict=True):
            if isinstance(boxes, str):
                problems.append(Problem(site=site.name, name=row.name, reason=boxes))
        sites.append(_kept(site, found, most))
    ordered = tuple(sorted(problems, key=lambda p: (p.site, p.name, p.reason)))
    return replace(registration, sites=tuple(sites), problems=ordered)


def cut(boxes: NDArray[np.float64], given: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return boxes (M, 5) where they lie once an image of a ``given`` (height, width) is cut to ``size``, clipped.

    An image is scaled to cover ``size`` and cut at its centre; what is less than a pixel wide or high is left out.
    """
    corner, seen = _centre(given, size)
    out = boxes.astype(np.float32)
    out[:, :4] = np.clip((boxes[:, :4] - corner) / seen, 0.0, 1.0)
    pixels = (out[:, 2:4] - out[:, :2]) * (size[1], size[0])
    return out[(pixels >= 1 - 1e-3).all(1)]


def uncut(boxes: NDArray[np.float64], given: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float64]:
    """Return boxes (M, 4+), in 0..1 of an image cut to ``size``, in pixels of the ``given`` (height, width) it had."""
    corner, seen = _centre(given, size)
    return np.concatenate([boxes[:, :4] * seen + corner, boxes[:, 4:]], axis=1)


def _centre(given: tuple[int, int], size: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return corner and size (4,), x and y twice, of what a cut leaves, in pixels before it."""
    scale = min(given[0] / size[0], given[1] / size[1])
    seen = np.array([size[1] * scale, size[0] * scale] * 2)
    return (np.array([given[1], given[0]] * 2) - seen) / 2, seen


def around(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the boxes (M, 5), in pixels, around the connected parts of each class of a mask (H, W).

    Pixels that touch at a corner are connected, too.
    """
    from scipy import ndimage

    found = []
    for k in np.unique(mask[mask > 0]).tolist():
        parts, _ = ndimage.label(mask == k, structure=np.ones((3, 3)))
        found += [(x.start, y.start, x.stop, y.stop, k) for y, x in ndimage.find_objects(parts)]
    return np.array(found, np.float64).reshape(-1, 5)


def _read(
    row: Row, fact: Fact, classes: Sequence[str], size: tuple[int, int], max_pixels: int
) -> tuple[NDArray[np.float32] | str, str]:
    """Return the boxes of an image, or why there are none that will do, and the digest of what they come from."""
    if row.boxes is None:
        content = read_mask(row, max_pixels)
        if isinstance(content, str):
            return content, ""
        mask = decoded_mask(content, fact, len(classes))
        told = hashlib.sha256(content).hexdigest()
        boxes = mask if isinstance(mask, str) else around(mask)
    else:
        boxes = _numbered(row.boxes, fact, classes)
        told = hashlib.sha256(repr(row.boxes).encode()).hexdigest()
    if not isinstance(boxes, str) and len(boxes) > MOST:
        boxes = MANY
    return boxes if isinstance(boxes, str) else cut(boxes, (fact.height, fact.width), size), told


def _numbered(boxes: Sequence[Box], fact: Fact, classes: Sequence[str]) -> NDArray[np.float64] | str:
    """Return boxes (M, 5) with the numbers of their classes; where there is one class only it needs no name."""
    index = {name: k for k, name in enumerate(classes)} | ({"": 1} if len(classes) == 2 else {})
    if any(box[4] not in index for box in boxes):
        return UNNAMED
    found = np.array([(*box[:4], index[box[4]]) for box in boxes], np.float64).reshape(-1, 5)
    ends = np.array([fact.width, fact.height])
    if (found[:, :2] < -_SLACK).any() or (found[:, 2:4] > ends + _SLACK).any():
        return OUTSIDE
    return found


def _kept(site: SiteFiles, found: Sequence[tuple[NDArray[np.float32] | str, str]], most: int) -> SiteFiles:
    rows = np.array([i for i, (boxes, _) in enumerate(found) if not isinstance(boxes, str)], np.int64)
    targets = np.full((len(rows), most, 5), -1, np.float32)
    for place, i in enumerate(rows):
        targets[place, : len(found[i][0])] = found[i][0]
    return replace(only(site, rows), targets=targets, target_digests=tuple(found[i][1] for i in rows))

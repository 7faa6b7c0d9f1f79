"""Masks of images: found, decoded without a change of any value, laid over the image's own cut, and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from confrere.data.cache import Fact, workers
from confrere.data.decode import BadImageError, read_picture, values
from confrere.data.mapped import Blank, Mapped, made
from confrere.data.register import Registration, SiteFiles, only
from confrere.data.sources import Problem, Row
from confrere.data.view import View

DEFAULT_CLASSES = ("background", "foreground")
NONE = "the image has no mask"
OTHER_SIZE = "the mask has another size than its image"
VALUES = "the mask holds a value that is no class"
_PART = 256
_BAD = 255  # fills the row of a mask that cannot be used
_VERSION = 1


def with_masks(
    registration: Registration, classes: Sequence[str], size: tuple[int, int], cache: Path, *, max_pixels: int
) -> Registration:
    """Return the registration with the masks of all images, and without the images that have none that will do.

    Args:
        registration: of images.
        classes: K names, the background first; a mask holds 0..K-1, or 0 and 255 where K is 2.
        size: (height, width) in pixels, that of the decoded images.
        cache: folder of decoded arrays.
        max_pixels: a mask with more is not decoded.

    Raises:
        DataError: the cache cannot be written.
    """
    problems, sites = list(registration.problems), []
    for site in registration.sites:
        pairs = list(zip(site.rows, site.entry.facts, strict=True))
        with ThreadPoolExecutor(workers()) as pool:
            files = list(pool.map(lambda pair: read_mask(pair[0], max_pixels), pairs))
        read = [content if isinstance(content, bytes) else b"" for content in files]
        digests = [hashlib.sha256(content).hexdigest() for content in read]
        kept, good = _kept(site, read, digests, len(classes), size, cache)
        for row, fact, content, use in zip(site.rows, site.entry.facts, files, good, strict=True):
            if not use:
                why = content if isinstance(content, str) else _decoded(content, fact, size, len(classes))
                problems.append(Problem(site=site.name, name=row.name, reason=str(why)))
        rows = np.flatnonzero(good)
        told = tuple(digests[i] for i in rows)
        sites.append(replace(only(site, rows), targets=View(kept, rows), target_digests=told))
    ordered = tuple(sorted(problems, key=lambda p: (p.site, p.name, p.reason)))
    return replace(registration, sites=tuple(sites), problems=ordered)


def read_mask(row: Row, max_pixels: int) -> bytes | str:
    """Return the bytes of a row's mask, or why there are none."""
    if row.mask is None:
        return NONE
    try:
        return read_picture(row.mask, max_pixels=max_pixels)
    except BadImageError as error:
        return f"mask: {error}" if row.mask.exists() else NONE


def decoded_mask(content: bytes, fact: Fact, classes: int) -> NDArray[np.uint8] | str:
    """Return a mask (height, width) of its image's size, of values 0..classes - 1, or why there is none."""
    try:
        found = values(content)
    except BadImageError as error:
        return f"mask: {error}"
    if found.shape != (fact.height, fact.width):
        return OTHER_SIZE
    if classes == 2 and found.max() == 255 and np.isin(found, (0, 255)).all():
        found = found // 255
    if found.max() >= classes or found.min() < 0:
        return VALUES
    return found.astype(np.uint8)


def _decoded(content: bytes, fact: Fact, size: tuple[int, int], classes: int) -> NDArray[np.uint8] | str:
    """Return a mask (H, W) cut as its image is, or why there is none."""
    found = decoded_mask(content, fact, classes)
    if isinstance(found, str):
        return found
    upright = Image.fromarray(found)
    fitted = ImageOps.fit(upright, (size[1], size[0]), method=Image.Resampling.NEAREST)
    return np.asarray(fitted, dtype=np.uint8)


def _kept(
    site: SiteFiles, read: Sequence[bytes], digests: Sequence[str], classes: int, size: tuple[int, int], cache: Path
) -> tuple[Mapped, NDArray[np.bool_]]:
    """Return the site's masks (N, H, W), made once, and which of them can be used."""
    facts = site.entry.facts
    text = "|".join([f"{_VERSION}", f"{size}", f"{classes}", *digests, *(fact.digest for fact in facts)])
    path = cache / f"masks-{hashlib.sha256(text.encode()).hexdigest()}.npy"

    def fill(new: Blank) -> np.memmap[Any, Any]:
        out = new((len(facts), *size), np.uint8)
        with ThreadPoolExecutor(workers()) as pool:
            found = pool.map(lambda pair: _decoded(pair[0], pair[1], size, classes), zip(read, facts, strict=True))
            for row, mask in enumerate(found):
                out[row] = _BAD if isinstance(mask, str) else mask
        return out

    masks = made(path, len(facts), fill, "masks")
    corners = [masks[i : i + _PART][:, 0, 0] for i in range(0, len(masks), _PART)]
    return masks, np.concatenate([*corners, np.zeros(0, np.uint8)]) != _BAD

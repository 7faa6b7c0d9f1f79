"""The frozen prefix, computed once per image and memory-mapped: tokens in front of the first adapted block."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confrere.backbones import Backbone
from confrere.data.cache import DECODER
from confrere.data.federation import SiteImages
from confrere.data.mapped import Blank, Mapped, made
from confrere.data.view import View
from confrere.errors import ConfigError
from confrere.seeds import derive
from confrere.tokenset import Array, TokenSet, as_numpy, keys_of, oriented

BATCH = 64


def cache_dir() -> Path:
    """Return where decoded images and frozen activations are kept: $CONFRERE_CACHE or ~/.cache/confrere."""
    return Path(os.environ.get("CONFRERE_CACHE") or Path.home() / ".cache" / "confrere")


@dataclass(frozen=True)
class Turned:
    """Rows (N,) of images in one orientation, turned as they are read."""

    images: Mapped | View | NDArray[np.float32]
    rows: np.ndarray
    view: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """Return the rows (B, H, W, 3) in that order."""
        return oriented(self.images[self.rows[rows]], self.view)


class Stacked:
    """Arrays of equal row shape read as one, without copying them together."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """Return the rows (B,) in that order."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        out: np.ndarray | None = None
        for index in np.unique(owner):
            here = owner == index
            found = self._parts[index][rows[here] - self._starts[index]]
            if out is None:
                out = np.empty((len(rows), *found.shape[1:]), found.dtype)
            out[here] = found
        return self._parts[0][rows] if out is None else out


def tokens(
    backbone: Backbone,
    site: SiteImages,
    classes: tuple[str, ...],
    cache: Path,
    progress: Callable[[str, int, int], None] | None = None,
    views: int = 1,
) -> TokenSet:
    """Return the tokens of all images of ``site``, and of training images in all ``views``, cached where possible.

    The key covers weights, precision, cut, normalisation, image size, every image's hash, and the versions that decide
    the last bit.

    Raises:
        DataError: the cache cannot be written.
        ConfigError: eight views of images that are not square.
    """
    if len(site.images.shape) == 3:  # a table: nothing worth a file
        rows = as_numpy(backbone.prefix(site.images[np.arange(len(site.labels))]))
        return TokenSet(
            tokens=rows,
            labels=site.labels,
            groups=site.groups,
            split=site.split,
            classes=classes,
            truth=site.targets,
            named=site.named,
            keys=keys_of(site.groups, site.digests),
        )
    every, train = np.arange(len(site.labels)), np.flatnonzero(site.split == 0)
    if views > 4 and len(set(backbone.image_size)) > 1:
        raise ConfigError("images that are not square have four views", where="train.views", fix="use 1, 2 or 4")

    def kept(view: int) -> Array:
        if backbone.anatomy.trained:  # nothing is frozen
            return Turned(site.images, every if view == 0 else train, view)
        return _cached(backbone, site, every if view == 0 else train, view, cache, progress)

    return TokenSet(
        tokens=kept(0),
        views=tuple(kept(view) for view in range(1, views)),
        labels=site.labels,
        groups=site.groups,
        split=site.split,
        classes=classes,
        truth=site.targets,
        named=site.named,
        keys=keys_of(site.groups, site.digests),
    )


def join(sets: Sequence[TokenSet]) -> TokenSet:
    """Return several sites' rows as one set: the pooled control."""
    first = sets[0]
    return TokenSet(
        tokens=Stacked([s.tokens for s in sets]),
        views=tuple(Stacked(same) for same in zip(*(s.views for s in sets), strict=True)),
        labels=np.concatenate([s.labels for s in sets]),
        groups=np.concatenate([s.groups for s in sets]),
        split=np.concatenate([s.split for s in sets]),
        classes=first.classes,
        keys=np.concatenate([s.keys for s in sets]),
        truth=Stacked([s.truth for s in sets if s.truth is not None]) if first.truth is not None else None,
    )


def _cached(
    backbone: Backbone,
    site: SiteImages,
    rows: np.ndarray,
    view: int,
    cache: Path,
    progress: Callable[[str, int, int], None] | None,
) -> Mapped:
    """Return the tokens of some images in one orientation, computed in batches if the cache has none."""
    turned = (f"view {view}",) if view else ()
    key = derive(0, "prefix", backbone.prefix_digest, DECODER, *turned, *(site.digests[row] for row in rows))

    def part(start: int) -> np.ndarray:
        return as_numpy(backbone.prefix(oriented(site.images[rows[start : start + BATCH]], view)))

    def fill(new: Blank) -> np.memmap[Any, Any]:
        first = part(0)
        out = new((len(rows), *first.shape[1:]), first.dtype)
        for start in range(0, len(rows), BATCH):
            out[start : start + BATCH] = part(start) if start else first
            if progress is not None:
                progress(site.name, min(start + BATCH, len(rows)), len(rows))
        return out

    return made(cache / f"tokens-{key:016x}.npy", len(rows), fill, "frozen activations")

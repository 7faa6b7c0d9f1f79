"""A site's images after the frozen prefix, and batches of them on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Array(Protocol):
    """What gives copies of rows by number: an array, a file mapped while it is read, or several of them as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """One site's images after the frozen prefix, with labels, patients and split.

    Args:
        tokens: float32 array-like (N, tokens, width), usually memory-mapped; int16 holds the bits of bfloat16.
        views: other orientations of the training images, each (training images, tokens, width).
        labels: int64 (N,), by which images are drawn. groups: int64 (N,), opaque patient numbers. split: int8 (N,),
            0 train, 1 val, 2 test.
        truth: what a model learns where that is not the label: masks uint8 (N, H, W); or float32: boxes (N, most, 5),
            findings (N, K), or time and event (N, 2).
        named: the ``groups`` that are one patient, named; see :class:`confrere.data.images.SiteImages`.
        keys: uint64 (N,), the same for all images of a patient, and whoever else is there; see :func:`keys_of`.
    """

    tokens: Array
    labels: np.ndarray
    groups: np.ndarray
    split: np.ndarray
    classes: tuple[str, ...]
    views: tuple[Array, ...] = ()
    truth: Array | None = None
    named: frozenset[int] = frozenset()
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def rows(self, split: str) -> np.ndarray:
        """Return the row numbers of ``train``, ``val`` or ``test``."""
        return np.flatnonzero(self.split == ("train", "val", "test").index(split))

    def trained_on(self, chosen: np.ndarray) -> TokenSet:
        """Return the same set with ``chosen``, row numbers of training images in any order, as its only ones."""
        split, rows, chosen = self.split.copy(), self.rows("train"), np.sort(chosen)
        split[rows] = -1  # a code of no split
        split[chosen] = 0
        at = np.searchsorted(rows, chosen)
        return replace(self, split=split, views=tuple(Chosen(view, at) for view in self.views))

    def rows_of_shard(self, shard: int, shards: int) -> np.ndarray:
        """Return the training rows of the patients of one of ``shards`` parts, by their keys."""
        rows = self.rows("train")
        own: np.ndarray = rows[shard_of(self.keys[rows], shards) == shard]
        return own

    def batch(self, rows: np.ndarray, views: np.ndarray | None = None) -> Batch:
        """Return the rows as tensors, copied out of the memory map; training rows in the orientation of ``views``."""
        found = self.tokens[rows]
        if views is not None:
            at = np.searchsorted(self.rows("train"), rows)
            for view in np.unique(views[views > 0]):
                found[views == view] = self.views[view - 1][at[views == view]]
        tokens = torch.from_numpy(found)
        if tokens.dtype == torch.int16:
            tokens = tokens.view(torch.bfloat16)
        return Batch(tokens, torch.from_numpy(self.targets(rows, views)))

    def targets(self, rows: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Return what a model should say of the rows, ``truth`` or else classes (B,), oriented as ``views``."""
        found: np.ndarray = (self.labels if self.truth is None else self.truth)[rows]
        for view in np.unique(views[views > 0]) if views is not None and found.ndim == 3 else ():
            part = found[views == view]
            masks = found.dtype == np.uint8
            found[views == view] = oriented(part[..., None], int(view))[..., 0] if masks else turned(part, int(view))
        return found


@dataclass(frozen=True)
class Chosen:
    """Some rows of an array, in this order."""

    base: Array
    which: np.ndarray

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        return self.base[self.which[rows]]


def keys_of(groups: np.ndarray, digests: Sequence[str]) -> np.ndarray:
    """Return a number of each image's patient, uint64 (N,): the start of the smallest SHA-256 of his or her images.

    Patients' numbers (``groups``) change when somebody is deleted; this one does not.
    """
    first: dict[int, str] = {}
    for group, digest in zip(groups.tolist(), digests, strict=True):
        first[group] = min(digest, first.get(group, digest))
    return np.array([int(first[group][:16], 16) for group in groups.tolist()], dtype=np.uint64)


def shard_of(keys: np.ndarray, shards: int) -> np.ndarray:
    """Return the shard (N,) of each image by its patient's key."""
    return np.asarray(keys % np.uint64(shards), dtype=np.int64)


def oriented(images: np.ndarray, view: int) -> np.ndarray:
    """Return images (B, H, W, C) in one of 8 orientations: bit 0 mirrors, bit 1 turns upside down, bit 2 transposes."""
    images = images.transpose(0, 2, 1, 3) if view & 4 else images
    images = images[:, :, ::-1] if view & 1 else images
    return np.ascontiguousarray(images[:, ::-1] if view & 2 else images)


def turned(boxes: np.ndarray, view: int) -> np.ndarray:
    """Return boxes (B, most, 5), in 0..1 of the image, where :func:`oriented` puts what they surround."""
    out = boxes[..., [1, 0, 3, 2, 4]] if view & 4 else boxes.copy()
    there = boxes[..., 4:] > 0
    for bit, sides in ((1, [2, 0]), (2, [3, 1])):
        if view & bit:
            out[..., sides[::-1]] = np.where(there, 1 - out[..., sides], out[..., sides[::-1]])
    return out


def as_numpy(tokens: Tensor) -> np.ndarray:
    """Return tokens as an array for :class:`TokenSet`; bfloat16, which NumPy lacks, as int16 of the same bits."""
    tokens = tokens.cpu()
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


@dataclass
class Batch:
    """Tokens (B, N, D), targets (B, ...), and inputs of the adapted layers when they were captured."""

    tokens: Tensor
    labels: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """Return a copy on ``device``, without waiting for it when this one is pinned."""
        return Batch(self.tokens.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return a copy in page-locked memory, from which a GPU reads by itself."""
        return Batch(self.tokens.pin_memory(), self.labels.pin_memory())


def feed(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on ``device``: on CUDA from pinned memory over a stream of their own; on the CPU as they are.

    The CUDA path has not been measured: no machine of ours has one.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    kept: list[
        Batch
    ] = []  # pinned sources and copies of this batch and the next: alive until the step that uses them ends
    for batch in batches:
        pinned = batch.pinned()
        with torch.cuda.stream(stream):
            copy = pinned.to(device)
        if kept:
            yield kept[1]
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.current_stream(device).synchronize()  # the last step is done: its memory may be used again
        kept = [pinned, copy]
    if kept:
        yield kept[1]

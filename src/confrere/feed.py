"""Batches from memory to the processor that computes on them, one ahead of the step that needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, Self, TypeVar

import torch


class Movable(Protocol):
    """What can be copied to a device."""

    def to(self, device: torch.device) -> Self:
        """Return it there; a copy from pinned memory does not wait for its end."""

    def pinned(self) -> Self:
        """Return it in page-locked memory."""


M = TypeVar("M", bound=Movable)


def feed(batches: Iterable[M], device: torch.device) -> Iterator[M]:
    """Yield the batches on ``device``: on CUDA from pinned memory over a stream of their own; on the CPU as they are.

    The CUDA path has not been measured: no machine of ours has one.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    kept: list[M] = []  # pinned sources and copies of this batch and the next: alive until the step that uses them ends
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

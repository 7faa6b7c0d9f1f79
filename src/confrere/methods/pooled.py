"""Pooled training: the control that privacy forbids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from confrere.method import Method, register


@register("pooled", title="All images in one place (pooled)")
@dataclass(frozen=True, kw_only=True)
class Pooled(Method):
    """Train one adapter and head on all sites' training images together, as if they could be pooled.

    It takes as many steps a round as all sites take together, so it sees as many images as they do.
    """

    whole: ClassVar[bool] = True
    pools: ClassVar[bool] = True

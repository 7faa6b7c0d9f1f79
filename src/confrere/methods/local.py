"""Local-only training: what a hospital gets without joining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from confrere.method import Method, register
from confrere.tensors import State, Tensors


@register("local", title="Training alone (local-only)")
@dataclass(frozen=True, kw_only=True)
class Local(Method):
    """Train one adapter and head per site; nothing is sent or received."""

    sends: ClassVar[tuple[str, ...]] = ()
    slots: ClassVar[tuple[str, ...]] = ("personal",)
    whole: ClassVar[bool] = True
    unequal: ClassVar[bool] = True
    depths: ClassVar[bool] = True

    def shared(self, name: str) -> bool:
        """Nothing is shared."""
        return False

    def broadcast(self, server: State, site: str) -> State:
        """Nothing is received."""
        return {}

    def split(self, params: Tensors) -> tuple[State, State]:
        """Everything stays."""
        return {}, self.init_site(params)

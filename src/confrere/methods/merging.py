"""What methods share whose server merges what it cannot average into the frozen weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from confrere.adapters import residual
from confrere.method import Method
from confrere.tensors import State, pick


@dataclass(frozen=True, kw_only=True)
class Merging(Method):
    """A site computes with ``W0 + scale R``, R being held by the server beside W0. Not registered: a base class."""

    fixed: ClassVar[tuple[str, ...]] = (residual.SLOT,)

    @property
    def needs(self) -> Literal["sum", "each"]:
        """The server multiplies each site's own factors."""
        return "each"

    def shared(self, name: str) -> bool:
        """Everything that is trained is sent."""
        return not residual.is_residual(name)

    def broadcast(self, server: State, site: str) -> State:
        """Send what is trained, and R in a group that no site sends back."""
        held = server["shared"]
        return {"shared": pick(held, self.shared), residual.SLOT: pick(held, residual.is_residual)}

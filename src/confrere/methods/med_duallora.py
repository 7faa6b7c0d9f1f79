"""Med-DualLoRA: a general and a personal adapter, added and trained together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from confrere.adapters.names import slot_of
from confrere.method import Method, one_of, register


@register(
    "med-duallora",
    title="General + personal, added (Med-DualLoRA)",
    paper="Perramon-Llussà et al., Med-DualLoRA, MICCAI 2026, arXiv 2603.10967",
)
@dataclass(frozen=True, kw_only=True)
class MedDualLoRA(Method):
    """Train general and personal LoRA factors in one step; average the general ones, keep the personal ones.

    ``y = W0 x + b + s B_g A_g x + s B_k A_k x``, ``L_k = L_task``: the method ``dual`` with the head local.

    Args:
        head: ``local`` (stays at the site) or ``shared`` (averaged with the general adapter).

    Differences from the paper: written from its abstract, which names the additive form, local training of both
    adapters, aggregation of the global one only, and that two adapted blocks are enough (set ``adapter.blocks=2``;
    the package's default is 4). The head's place, joint steps, ranks and the mean of factors are our reconstruction;
    images instead of cardiac volumes.
    """

    slots: ClassVar[tuple[str, ...]] = ("general", "personal")
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"head": ("choice", "local", "shared")}

    head: str = "local"

    def __post_init__(self) -> None:
        one_of("method.head", self.head, ("local", "shared"))

    def shared(self, name: str) -> bool:
        """General factors are sent, personal ones never; the head by policy."""
        return self.head == "shared" if name.startswith("head.") else slot_of(name) == "general"

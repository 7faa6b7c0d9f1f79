"""FedPer: the adapter is everybody's, the head each site's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from confrere.method import Method, register


@register(
    "fedper",
    title="Shared adapter, local head (FedPer)",
    paper="Arivazhagan et al., Federated Learning with Personalization Layers, 2019, arXiv 1912.00818",
)
@dataclass(frozen=True, kw_only=True)
class FedPer(Method):
    """Train adapter and head together; average the adapter, keep the head.

    Sites may thus differ in how often, or under which conventions, they use each label. A site that never trained has
    no head, so there is no general model.

    Differences from the paper: the base layers are LoRA factors in a frozen transformer; one linear head is the
    personal layer; AdamW instead of SGD.
    """

    whole: ClassVar[bool] = True

    def shared(self, name: str) -> bool:
        """All but the head."""
        return not name.startswith("head.")

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return all steps: what is kept is trained by the same noisy steps."""
        return steps

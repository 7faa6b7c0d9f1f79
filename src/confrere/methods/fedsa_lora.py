"""FedSA-LoRA: A is everybody's; B and the head are each site's own."""

from __future__ import annotations

from dataclasses import dataclass

from confrere.adapters.names import side_of
from confrere.method import Method, register


@register(
    "fedsa-lora",
    title="Shared A, local B and head (FedSA-LoRA)",
    paper="Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025, "
    "arXiv 2410.01463",
)
@dataclass(frozen=True, kw_only=True)
class FedSALoRA(Method):
    """Train A, B and the head together; average A, keep B and the head.

    The paper finds that A holds what sites have in common. A message is about half of FedIT's. A site that never
    trained has neither B nor head, so there is no general model.

    Differences from the paper: written from the paper and its published settings, not from its code; a fresh optimiser
    in every round; AdamW instead of SGD.
    """

    def shared(self, name: str) -> bool:
        """Only A is sent."""
        return side_of(name) == "A"

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return all steps: what is kept is trained by the same noisy steps."""
        return steps

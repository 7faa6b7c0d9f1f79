"""FedIT: one adapter shared by all sites, its factors averaged each round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from confrere.method import Method, register


@register(
    "fedit",
    title="One shared adapter (FedIT)",
    paper="Zhang et al., Towards Building the Federated GPT, ICASSP 2024, arXiv 2305.05644",
)
@dataclass(frozen=True, kw_only=True)
class FedIT(Method):
    """Average the LoRA factors A and B and the head, weighted by training images: FedAvg over adapters.

    The control for every personalised method: it has the same total rank and takes the same local steps.

    Differences from the paper: a vision transformer and a linear head instead of a language model; a fresh
    optimiser in every round; local steps instead of local epochs.
    """

    whole: ClassVar[bool] = True

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return all steps: what is sent is trained from what was received alone."""
        return steps

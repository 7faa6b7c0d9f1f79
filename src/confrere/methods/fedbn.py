"""FedBN: the layer norms are each site's own, adapter and head everybody's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from confrere.adapters.names import slot_of
from confrere.method import Method, register


@register(
    "fedbn",
    title="Shared adapter and head, local norms (FedBN)",
    paper="Li et al., FedBN, ICLR 2021, arXiv 2102.07623",
)
@dataclass(frozen=True, kw_only=True)
class FedBN(Method):
    """Train adapter, head and the layer norms of the adapted blocks together; keep the norms at the site.

    They may take up what differs between scanners. The general model, for a hospital that never trained, has the
    pretrained norms.

    Differences from the paper: a vision transformer has layer norms, which have weights and biases but no running
    statistics, so only the former are local; norms of frozen blocks stay frozen; weight decay acts on norms, too.
    """

    norms: ClassVar[bool] = True

    def shared(self, name: str) -> bool:
        """Adapter and head are sent, norms never."""
        return slot_of(name) is not None or name.startswith("head.")

    def noised(self, steps: int, round_: int, rounds: int) -> int | None:
        """Return all steps: what is kept is trained by the same noisy steps."""
        return steps

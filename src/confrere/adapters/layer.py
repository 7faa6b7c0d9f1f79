"""The LoRA layer: PEFT's names and arithmetic, without its import and with fewer passes over memory.

Shapes: x is (..., i), A of all slots together (R, i), B (o, R).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from confrere.adapters.dropout import SeededDropout


class Factor(nn.Module):
    """A place for one factor; tensors are passed by name, so it is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, 0))


class LoraLinear(nn.Module):
    """``y = W x + b + scale * sum over slots of B_s A_s dropout(x)``, the input being dropped once for all slots.

    Names are those of PEFT's ``Linear``: ``base_layer.weight``, ``lora_A.<slot>.weight``, ``lora_B.<slot>.weight``.
    """

    def __init__(self, base: nn.Linear, slots: Sequence[str], scale: float, dropout: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        self.lora_A = nn.ModuleDict({slot: Factor() for slot in slots})
        self.lora_B = nn.ModuleDict({slot: Factor() for slot in slots})
        self.dropout = SeededDropout(dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of all slots as one pair: A (R, i) and B (o, R)."""
        a: list[Tensor] = [factor.weight for factor in self.lora_A.values()]  # type: ignore[misc]
        b: list[Tensor] = [factor.weight for factor in self.lora_B.values()]  # type: ignore[misc]
        return (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.cat(b, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., o)."""
        a, b = self.factors()
        return add_low_rank(self.base_layer(x), nn.functional.linear(self.dropout(x), a), b, self.scale)


def add_low_rank(out: Tensor, inner: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``out + scale * inner @ b.T`` for ``out`` (..., o), ``inner`` (..., R) and ``b`` (o, R)."""
    flat = torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=scale)
    return flat.view(out.shape)

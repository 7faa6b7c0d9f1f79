"""The LoRA layer: PEFT's names and arithmetic, without its import and with fewer passes over memory.

Shapes: x is (..., i), A of all slots together (R, i), B (o, R).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from confrere.adapters.dropout import SeededDropout
from confrere.errors import BackboneError


class Factor(nn.Module):
    """A place for one factor; tensors are passed by name, so it is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, 0))


class LoraLinear(nn.Module):
    """``y = W x + b + scale * sum over slots of B_s A_s dropout(x)``, the input being dropped once for all slots.

    Names are those of PEFT's ``Linear``: ``base_layer.weight``, ``lora_A.<slot>.weight``, ``lora_B.<slot>.weight``.
    Two extensions are off unless a method asks for them: slots that count by a weight, of a gate token by token
    (``softmax(G x)``) or of each image (``by_image``), and a shift between the factors, ``B_s (A_s x + q_s)``.
    """

    def __init__(
        self,
        base: nn.Linear,
        slots: Sequence[str],
        scale: float,
        dropout: float,
        *,
        gated: bool = False,
        shifted: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        self.lora_A = nn.ModuleDict({slot: Factor() for slot in slots})
        self.lora_B = nn.ModuleDict({slot: Factor() for slot in slots})
        self.lora_gate = Factor() if gated else None
        self.lora_shift = nn.ModuleDict({slot: Factor() for slot in slots}) if shifted else None
        self.by_image: Tensor | None = None
        self.dropout = SeededDropout(dropout)

    @property
    def weight(self) -> Tensor:
        """Refuse: who reads the weight instead of calling the layer would leave the adapters out."""
        raise BackboneError(
            "the architecture reads an adapted layer's weight without calling it: adapters would do nothing there",
            fix="choose other adapter.targets",
            code="backbone-unsupported",
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of all slots as one pair: A (R, i) and B (o, R)."""
        a: list[Tensor] = [factor.weight for factor in self.lora_A.values()]  # type: ignore[misc]
        b: list[Tensor] = [factor.weight for factor in self.lora_B.values()]  # type: ignore[misc]
        return (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.cat(b, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., o)."""
        a, b = self.factors()
        inner = nn.functional.linear(self.dropout(x), a)
        if self.lora_shift is not None:
            inner = inner + torch.cat([shift.weight for shift in self.lora_shift.values()])  # type: ignore[misc]
        if self.lora_gate is not None or self.by_image is not None:
            inner = inner * self._weights(x)
        return add_low_rank(self.base_layer(x), inner, b, self.scale)

    def _weights(self, x: Tensor) -> Tensor:
        """Return how much each slot counts, (..., R)."""
        if self.by_image is not None:
            weights = self.by_image.to(x.dtype).view(len(x), *[1] * (x.ndim - 2), -1)
        else:
            weights = nn.functional.linear(x, self.lora_gate.weight).softmax(-1)  # type: ignore[union-attr]
        ranks = [len(factor.weight) for factor in self.lora_A.values()]  # type: ignore[arg-type]
        each: Tensor = weights.repeat_interleave(torch.tensor(ranks, device=x.device), -1)
        return each


def add_low_rank(out: Tensor, inner: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``out + scale * inner @ b.T`` for ``out`` (..., o), ``inner`` (..., R) and ``b`` (o, R)."""
    flat = torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=scale)
    return flat.view(out.shape)

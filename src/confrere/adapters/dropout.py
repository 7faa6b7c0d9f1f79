"""Randomness inside a network, with an address: LoRA dropout, and numbers that a network draws to train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from confrere.seeds import torch_generator


class SeededDropout(nn.Module):
    """Dropout that draws from a given generator, never from the global one; off when there is none."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        # 16 random bits an element cost an eighth of a Bernoulli draw; the rate is rounded to 1/65536.
        self.dropped = round(rate * 65536)
        self.generator: torch.Generator | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Return ``values`` with a part of its elements zeroed and the rest scaled up."""
        if self.generator is None or self.dropped == 0:
            return values
        words = torch.empty(values.numel() // 4 + 1, dtype=torch.int64, device=self.generator.device)
        words.random_(-(2**63), None, generator=self.generator)
        bits = words.view(torch.int16)[: values.numel()].view(values.shape)
        mask = (bits >= self.dropped - 32768).to(values).mul_(65536 / (65536 - self.dropped))
        return values * mask


class Chance(SeededDropout):
    """Numbers from the generator of a training step; the same ones for every image where there is none."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def forward(self, like: Tensor) -> Tensor:
        """Return uniform numbers of the shape of ``like``."""
        if self.generator is None:
            one = torch.rand(like.shape[1:], generator=torch_generator(0, "evaluation"))
            return one.expand(like.shape).to(like)
        return torch.rand(like.shape, generator=self.generator).to(like)

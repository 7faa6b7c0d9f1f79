"""The optimiser of every site."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """torch's AdamW by its functional form: the class imports the compiler, which every start would wait for.

    The same bits as ``torch.optim.AdamW`` with its default moments and epsilon; a tensor without gradient stays.
    """

    def __init__(self, params: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.state = [(torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for p in params]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every tensor that has a gradient."""
        moved = [(p, p.grad, *state) for p, state in zip(self.params, self.state, strict=True) if p.grad is not None]
        if not moved:
            return
        params, grads, means, squares, steps = map(list, zip(*moved, strict=True))
        adamw(
            params,
            grads,
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )

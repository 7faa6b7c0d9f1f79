"""The optimiser of every site, its learning rate over a run, and what is done to gradients before a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from confrere.tensors import Tensors


def scheduled(lr: float, schedule: str, warmup: float, progress: float) -> float:
    """Return the learning rate at a point of the run; never 0 between its ends.

    It rises linearly over the first ``warmup`` of the run. Then it stays (``constant``), or falls to 0 at the end along
    half a cosine (Loshchilov and Hutter, SGDR, ICLR 2017, equation 5). Differences from the paper: no restarts;
    ``progress`` spans all rounds, so that no site and no server has to remember where it is.

    Args:
        lr: its highest value.
        schedule: ``constant`` or ``cosine``.
        warmup: share of the run, in [0, 1).
        progress: share of the run that is over, in (0, 1); any number where the rate is constant.
    """
    if warmup and progress < warmup:
        return lr * progress / warmup
    if schedule == "constant":
        return lr
    return lr * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def accumulate(into: dict[str, Tensor], trained: Tensors, weight: float) -> None:
    """Add ``weight`` times each tensor's gradient (zero without one)."""
    for name, tensor in trained.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach() * weight
        into[name] = into[name] + gradient.cpu() if name in into else gradient.cpu()


def correct_gradients(trained: Tensors, correct: Tensors) -> None:
    """Add the correction to the gradients of the tensors it names."""
    for name in sorted(trained.keys() & correct.keys()):
        tensor, extra = trained[name], correct[name].to(trained[name].device)
        tensor.grad = extra.clone() if tensor.grad is None else tensor.grad + extra


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

"""A backbone that is no transformer and reads no images: frozen random features of a row of numbers.

A row is one token. An embedding (F to 64) and four residual blocks of two linear layers hold seeded random weights
that never change; all that is learnt sits in the adapters and the head. With an adapter rank of 64 an adapter is of
full rank, so that ``W + scale B A`` can become any matrix: an ordinary small network that starts from common random
weights. With a lower rank it is a low-rank change of random features.

Shapes: B rows, F numbers a row, D = 64 channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from confrere.backbones.anatomy import Anatomy
from confrere.backbones.loading import Loaded
from confrere.backbones.registry import Entry
from confrere.errors import BackboneError
from confrere.seeds import torch_generator
from confrere.tensors import digest

_SEED = 20260101


class _Block(nn.Module):
    """``x + fc2(gelu(fc1(norm(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 1, D)."""
        out: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return out


class _Mlp(nn.Module):
    def __init__(self, numbers: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(numbers, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)


class _Rows:
    """Checks rows of numbers; an object and no closure, so that copies of a backbone stay apart."""

    def __init__(self, numbers: int, name: str) -> None:
        self.numbers, self.name = numbers, name

    def __call__(self, rows: Any) -> Tensor:
        given: Tensor = torch.from_numpy(np.ascontiguousarray(rows)) if isinstance(rows, np.ndarray) else rows
        if given.dtype != torch.float32 or tuple(given.shape[1:]) != (1, self.numbers) or not given.isfinite().all():
            raise BackboneError(
                f"rows must be finite float32 numbers of shape (B, 1, {self.numbers}), got {given.dtype} "
                f"{tuple(given.shape)}",
                where=self.name,
                fix="give a CSV of numbers; missing values are filled in by confrere.data.numbers",
                code="backbone-input",
            )
        return given


def random_mlp(entry: Entry, size: tuple[int, int] | None) -> Loaded:
    """Return the network for rows of F numbers, ``size`` being (1, F).

    Raises:
        BackboneError: no such size.
    """
    if size is None or size[0] != 1:
        raise BackboneError(
            "this backbone reads rows of numbers, no images",
            where=entry.name,
            fix="load it with image_size=(1, F)",
            code="backbone-input",
        )
    width, depth = int(entry.width or 0), int(entry.depth or 0)
    with torch.device("meta"):
        model = _Mlp(size[1], width, depth)
    model.load_state_dict(_weights(model), strict=True, assign=True)
    anatomy = Anatomy(
        root=model,
        family="mlp",
        width=width,
        patch=(1, 1),
        blocks_path="blocks",
        embed=model.embed,
        norm=model.norm,
        accept=_Rows(size[1], entry.name),
        qv=r"fc[12]",
    )
    return Loaded(anatomy, entry, digest({"": model.state_dict()}))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return normal matrices of variance 1/fan-in, each drawn at its name; norms that do nothing; no biases."""
    drawn = {}
    for name, value in model.state_dict().items():
        if value.ndim == 2:
            generator = torch_generator(_SEED, "mlp", name)
            drawn[name] = torch.randn(value.shape, generator=generator) * value.shape[1] ** -0.5
        else:
            drawn[name] = torch.ones(value.shape) if name.endswith("norm.weight") else torch.zeros(value.shape)
    return drawn

"""LoRA slots on a frozen module.

A slot is one named low-rank branch, e.g. ``general``. All slots of a layer are summed:
``y = W x + scale * sum_s B_s A_s x`` with ``A_s: (r_s, d_in)`` and ``B_s: (d_out, r_s)``.
The name of a tensor is PEFT's own, slot included: ``<layer>.lora_A.<slot>.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from confrere.adapters.folder import export, import_
from confrere.adapters.names import layer_of, side_of, slot_of, tensor_name
from confrere.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "LoraSpec",
    "export",
    "import_",
    "init",
    "inject",
    "layer_of",
    "shapes",
    "side_of",
    "slot_of",
    "tensor_name",
]

_SLOT = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    r"""Where adapters sit and how strongly they act; ranks belong to the tensors.

    Args:
        slots: names of the summed branches, lower-case identifiers; none leaves the backbone as it is.
        blocks: the last ``blocks`` kept transformer blocks are adapted, at least 1.
        targets: ``"qv"`` (query and value), ``"all"`` (every linear layer of a block) or a regular
            expression that must match a layer's path inside its block, e.g. ``r"mlp\.fc[12]"``.
        scale: factor on ``B A x``, the same for every rank (PEFT's ``lora_alpha / r``).
        dropout: probability of dropping an input of ``A`` while training, in [0, 1).
        gated: every adapted layer weighs its slots token by token, ``softmax(G x)``.
        shifted: every slot adds a vector between its factors, ``B (A x + q)``.
        norms: the layer norms of the adapted blocks and the final one may be replaced by name, too.

    Raises:
        ConfigError: a value out of range.
    """

    slots: tuple[str, ...]
    blocks: int
    targets: str = "qv"
    scale: float = 2.0
    dropout: float = 0.05
    gated: bool = False
    shifted: bool = False
    norms: bool = False

    def __post_init__(self) -> None:
        if len(set(self.slots)) != len(self.slots):
            raise ConfigError(f"adapter slots must be distinct names, got {self.slots}", where="slots")
        for slot in self.slots:
            if not _SLOT.fullmatch(slot):
                raise ConfigError(
                    f"{slot!r} is not a slot name", where="slots", fix="use lower-case letters, digits and _"
                )
        try:
            re.compile(self.targets)
        except re.error as error:
            fix = "use qv, all or a regular expression"
            raise ConfigError(
                f"targets is not a regular expression: {error}", where="targets", fix=fix, code="adapter-targets"
            ) from error
        if self.blocks < 1:
            raise ConfigError(f"blocks must be at least 1, got {self.blocks}", where="blocks")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}", where="dropout")
        if not self.scale > 0:
            raise ConfigError(f"scale must be positive, got {self.scale}", where="scale")


def shapes(sizes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the shape of every adapter tensor.

    Args:
        sizes: ``(d_in, d_out)`` of each adapted layer.
        ranks: rank of each slot, at least 1.

    Raises:
        ConfigError: a rank below 1.
    """
    named = {}
    for slot, rank in ranks.items():
        if rank < 1:
            raise ConfigError(f"the rank of slot {slot!r} must be at least 1, got {rank}", where="rank")
        for layer, (d_in, d_out) in sizes.items():
            named[tensor_name(layer, "A", slot)] = (rank, d_in)
            named[tensor_name(layer, "B", slot)] = (d_out, rank)
    return named


def init(shapes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return first values: ``A`` uniform in ``±1/sqrt(d_in)``, ``B`` zero: the base model's function.

    The bound is PEFT's default (Kaiming uniform with ``a = sqrt(5)``). Names are drawn in sorted order.

    Raises:
        ConfigError: a name that is no adapter tensor's.
    """
    import torch

    values = {}
    for name, shape in sorted(shapes.items()):
        if side_of(name) == "A":
            bound = shape[1] ** -0.5
            values[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        elif side_of(name) == "B":
            values[name] = torch.zeros(shape)
        else:
            raise ConfigError(f"{name!r} is not the name of an adapter tensor", where="adapter")
    return values


def inject(module: nn.Module, layers: Sequence[str], spec: LoraSpec) -> None:
    """Put a :class:`LoraLinear` around each of ``layers`` in place, and freeze the module.

    The branches' own weights are empty placeholders: callers always pass tensors by name
    (:func:`torch.func.functional_call`), which is also why ranks may differ between slots and sites.
    """
    from confrere.adapters.layer import LoraLinear

    for path in layers if spec.slots else ():
        parent, _, leaf = path.rpartition(".")
        owner = module.get_submodule(parent)
        base = getattr(owner, leaf)
        layer = LoraLinear(base, spec.slots, spec.scale, spec.dropout, gated=spec.gated, shifted=spec.shifted)
        setattr(owner, leaf, layer)
    module.requires_grad_(False)
    module.eval()

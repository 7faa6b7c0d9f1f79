"""What was merged into frozen weights, held beside them: one full matrix per layer in a slot of its own.

The slot ``residual`` of a layer is the pair ``A`` = identity (i, i), ``B`` = R (o, i), so that its product is R itself,
exactly. Only R is stored and sent. R is in units before the adapters' ``scale``, as every product ``B A`` is: the layer
applies the scale (PEFT's alpha / r) once, to the sum of all slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from confrere.adapters.algebra import concat, pairs, product
from confrere.adapters.names import layer_of, slot_of, tensor_name
from confrere.tensors import Tensors

SLOT = "residual"


def is_residual(name: str) -> bool:
    """Return whether a tensor belongs to the slot."""
    return slot_of(name) == SLOT


def zero(params: Tensors, slot: str = "general") -> dict[str, Tensor]:
    """Return R = 0 for every layer that has an adapter in ``slot``."""
    return {
        tensor_name(layer, "B", SLOT): torch.zeros(len(b), a.shape[1]) for layer, (a, b) in pairs(params, slot).items()
    }


def complete(held: Tensors) -> dict[str, Tensor]:
    """Return R of every layer together with the identity, which is never sent."""
    full = {n: t for n, t in held.items() if is_residual(n)}
    eyes = {tensor_name(str(layer_of(n)), "A", SLOT): torch.eye(t.shape[1], dtype=t.dtype) for n, t in full.items()}
    return {**full, **eyes}


def add(held: Tensors, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return R + change for every layer of ``change``, summed in float64."""
    names = {layer: tensor_name(layer, "B", SLOT) for layer in sorted(change)}
    return {name: (held[name].double() + change[layer]).to(held[name].dtype) for layer, name in names.items()}


def mean_products(sent: Sequence[tuple[float, Tensors]], slot: str = "general") -> dict[str, Tensor]:
    """Return ``sum_k p_k B_k A_k`` (o, i) of every layer, float64, with ``p_k = w_k / sum w``; ranks may differ.

    It is the product of the stacked factors, with ``p_k`` on one side only: on both it would count squared.
    """
    total = sum(weight for weight, _ in sent)
    factors = [pairs(tensors, slot) for _, tensors in sent]
    weights = [weight / total for weight, _ in sent]
    return {
        layer: product(concat([(f[layer][0].double(), f[layer][1].double()) for f in factors], weights))
        for layer in factors[0]
    }

"""Several sites' models as one: a linear combination of what training changed, or all of them side by side.

A model here is one adapter slot and a head, by name; before training its products ``B A`` and its head are zero, so the
model is its own change. Ranks may differ between models. Shapes: M models, K classes, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from confrere.adapters import head
from confrere.adapters.algebra import concat, named, pairs
from confrere.adapters.names import side_of
from confrere.tensors import Tensors

RANKS, WEIGHTS, BIASES = "members.ranks", "members.weights", "members.biases"


def shares(kind: str, sizes: Sequence[float]) -> list[float]:
    """Return the coefficient of each model: ``sum`` 1, ``images`` its part of ``sizes``, else the same, of sum 1."""
    if kind == "sum":
        return [1.0] * len(sizes)
    return [size / sum(sizes) for size in sizes] if kind == "images" else [1 / len(sizes)] * len(sizes)


def fuse(models: Sequence[Tensors], coefficients: Sequence[float], slot: str = "general") -> dict[str, Tensor]:
    """Return the model whose products and head are the sum of ``c_m`` times the models', exactly; ranks add up."""
    factors = [pairs(model, slot) for model in models]
    merged = named({layer: concat([f[layer] for f in factors], coefficients) for layer in factors[0]}, slot)
    weights = torch.tensor(coefficients, dtype=torch.float64)
    for name in head.NAMES:
        stacked = torch.stack([model[name].double() for model in models])
        merged[name] = torch.tensordot(weights, stacked, 1).to(models[0][name].dtype)
    return merged


def times(model: Tensors, factor: float) -> dict[str, Tensor]:
    """Return ``factor`` times the change that ``model`` is: A stays."""
    return {name: value if side_of(name) == "A" else value * factor for name, value in model.items()}


def stack(models: Sequence[Tensors], slot: str = "general") -> dict[str, Tensor]:
    """Return :func:`fuse` with coefficients 1 and beside it what :func:`members` needs to take it apart.

    These are ``members.ranks`` (M,), ``members.weights`` (M, K, F) and ``members.biases`` (M, K).
    """
    ranks = [len(next(iter(pairs(model, slot).values()))[0]) for model in models]
    heads = {WEIGHTS: head.WEIGHT, BIASES: head.BIAS}
    apart = {name: torch.stack([model[of] for model in models]) for name, of in heads.items()}
    return {**fuse(models, [1.0] * len(models), slot), **apart, RANKS: torch.tensor(ranks)}


def members(stacked: Tensors) -> Iterator[dict[str, Tensor]]:
    """Yield the models that :func:`stack` put side by side."""
    first = 0
    for index, rank in enumerate(stacked[RANKS].tolist()):
        part = slice(first, first + rank)
        sides = {name: side_of(name) for name in stacked}
        factors = {n: stacked[n][part] if side == "A" else stacked[n][:, part] for n, side in sides.items() if side}
        yield {**factors, head.WEIGHT: stacked[WEIGHTS][index], head.BIAS: stacked[BIASES][index]}
        first += rank

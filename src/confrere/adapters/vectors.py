"""Several sites' models as one: a linear combination of what training changed, or all of them side by side.

A model here is one adapter slot and a head, by name; before training its products ``B A`` and its head are zero, so the
model is its own change. Ranks may differ between models. Shapes: M models, K classes, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from confrere.adapters import head
from confrere.adapters.algebra import Pair, concat, named, pairs, refactor
from confrere.adapters.names import side_of
from confrere.tensors import Tensors

RANKS, WEIGHTS, BIASES = "members.ranks", "members.weights", "members.biases"


def shares(kind: str, sizes: Sequence[float]) -> list[float]:
    """Return the coefficient of each model: ``sum`` 1, ``images`` its part of ``sizes``, else the same, of sum 1."""
    if kind == "sum":
        return [1.0] * len(sizes)
    return [size / sum(sizes) for size in sizes] if kind == "images" else [1 / len(sizes)] * len(sizes)


def mixed(adapters: Sequence[Tensors], coefficients: Sequence[float], slot: str = "general") -> dict[str, Pair]:
    """Return pairs by layer of product ``sum_m c_m B_m A_m``, exactly; ranks add up.

    They are factored anew: of factors side by side, who receives them could slice out each model's own.
    """
    factors = [pairs(adapter, slot) for adapter in adapters]
    beside = {layer: concat([f[layer] for f in factors], coefficients) for layer in factors[0]}
    return {layer: refactor(pair, len(pair[0])) for layer, pair in beside.items()}


def fuse(models: Sequence[Tensors], coefficients: Sequence[float], slot: str = "general") -> dict[str, Tensor]:
    """Return the model whose products (see :func:`mixed`) and head are the sum of ``c_m`` times the models'."""
    merged = named(mixed(models, coefficients, slot), slot)
    weights = torch.tensor(coefficients, dtype=torch.float64)
    for name in head.NAMES:
        stacked = torch.stack([model[name].double() for model in models])
        merged[name] = torch.tensordot(weights, stacked, 1).to(models[0][name].dtype)
    return merged


def times(model: Tensors, factor: float) -> dict[str, Tensor]:
    """Return ``factor`` times the change that ``model`` is: A stays."""
    return {name: value if side_of(name) == "A" else value * factor for name, value in model.items()}


def stack(models: Sequence[Tensors], slot: str = "general") -> dict[str, Tensor]:
    """Return all models' factors side by side, the sum of the heads, and what :func:`members` takes them apart by.

    These are ``members.ranks`` (M,), ``members.weights`` (M, K, F) and ``members.biases`` (M, K).
    """
    factors = [pairs(model, slot) for model in models]
    beside = named({layer: concat([f[layer] for f in factors]) for layer in factors[0]}, slot)
    heads = {WEIGHTS: head.WEIGHT, BIASES: head.BIAS}
    apart = {name: torch.stack([model[of] for model in models]) for name, of in heads.items()}
    sums = {of: apart[name].sum(0) for name, of in heads.items()}
    ranks = [len(next(iter(f.values()))[0]) for f in factors]
    return {**beside, **sums, **apart, RANKS: torch.tensor(ranks)}


def members(stacked: Tensors) -> Iterator[dict[str, Tensor]]:
    """Yield the models that :func:`stack` put side by side."""
    first = 0
    for index, rank in enumerate(stacked[RANKS].tolist()):
        part = slice(first, first + rank)
        sides = {name: side_of(name) for name in stacked}
        factors = {n: stacked[n][part] if side == "A" else stacked[n][:, part] for n, side in sides.items() if side}
        yield {**factors, head.WEIGHT: stacked[WEIGHTS][index], head.BIAS: stacked[BIASES][index]}
        first += rank


def side_by_side(models: Sequence[Tensors]) -> dict[str, Tensor]:
    """Return models of one rank as :func:`stack` does, without ranks: nothing but weights, which can be averaged."""
    return {name: value for name, value in stack(models).items() if name != RANKS}


def split_models(shared: Tensors, count: int) -> list[dict[str, Tensor]]:
    """Return the ``count`` models that :func:`side_by_side` returned."""
    rank = next(len(value) for name, value in shared.items() if side_of(name) == "A") // count
    return list(members({**shared, RANKS: torch.tensor([rank] * count)}))

"""Geometry of a round: overlap of general and personal adapters, similarity of sites, error of averaging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from confrere.adapters import residual
from confrere.adapters.algebra import Pair, column_overlap, concat, pairs, product, product_cosine, row_overlap
from confrere.adapters.names import layer_of, side_of, slot_of
from confrere.method import Reply
from confrere.tensors import Tensors, pick, sub

COMPARED = 64
"""Similarities are a matrix in every round's record: with more senders nobody reads it."""


def adapter_overlap(params: Tensors, inputs: Tensors) -> dict[str, float | None] | None:
    """Return the mean overlap over layers of the slots ``general`` and ``personal``; None without both.

    ``A``: row spaces, ``B``: column spaces (1 = the same subspace, r/d by chance), ``product``: absolute cosine of
    B A, ``outputs``: mean absolute cosine of what the two adapters add to the layers' ``inputs`` (B, N, d_in).
    A measure that is undefined (B = 0) is None.
    """
    general, personal = pairs(params, "general"), pairs(params, "personal")
    if not general or not personal:
        return None
    outputs: list[float | None] = []
    for layer, x in inputs.items():
        (a_g, b_g), (a_k, b_k) = general[layer], personal[layer]
        x = x.cpu()  # where the tensors that travel are
        left, right = x @ a_g.T @ b_g.T, x @ a_k.T @ b_k.T
        if left.abs().max() > 0 and right.abs().max() > 0:
            outputs.append(float(torch.nn.functional.cosine_similarity(left, right, dim=-1).abs().mean()))
        else:
            outputs.append(None)
    return {
        "A": _mean([row_overlap(general[k][0], personal[k][0]) for k in general]),
        "B": _mean([column_overlap(general[k][1], personal[k][1]) for k in general]),
        "product": _mean([product_cosine(general[k], personal[k]) for k in general]),
        "outputs": _mean(outputs),
    }


def site_similarity(server: Tensors, replies: Sequence[Reply]) -> dict[str, object] | None:
    """Return the cosine of the sites' updates (what was sent minus what was received), as names and a matrix.

    None for fewer than two senders, for more than :data:`COMPARED`, when an update is zero, and when what is sent
    has other names or shapes than what the server holds (the residual aside, which no site sends).
    """
    server = pick(server, lambda name: not residual.is_residual(name))
    senders = [r for r in replies if r.state.get("shared")]
    if not 2 <= len(senders) <= COMPARED or any(_shapes(r.state["shared"]) != _shapes(server) for r in senders):
        return None
    updates = torch.stack([_flat(sub(r.state["shared"], server)) for r in senders])
    norms = updates.norm(dim=1, keepdim=True)
    if float(norms.min()) == 0:
        return None
    matrix = (updates / norms) @ (updates / norms).T
    return {"sites": [r.site for r in senders], "matrix": [[round(x, 4) for x in row] for row in matrix.tolist()]}


def aggregation_error(
    aggregated: Tensors, replies: Sequence[Reply], slot: str = "general", before: Tensors | None = None
) -> float | None:
    """Return ``||mean(BA) - what the aggregate adds||_F / ||mean(BA)||_F`` over all layers; None if nothing was sent.

    Factor averaging is not the average of updates; this is by how much. The aggregate adds its ``B A`` and, where the
    server holds merged knowledge (slot ``residual``), what came to it since ``before``.
    """
    senders = [r for r in replies if r.state.get("shared")]
    merged = _complete(aggregated, slot)
    came = _came(aggregated, before or {})
    factors = [_complete(r.state["shared"], slot) for r in senders]
    layers = merged.keys() | came.keys()
    if not senders or not layers or any(f.keys() != layers for f in factors):
        return None
    total = sum(r.weight for r in senders)
    weights = [r.weight / total for r in senders]
    mean_square = error_square = 0.0
    for layer in sorted(layers):
        mean = product(concat([f[layer] for f in factors], weights))
        mean_square += float(mean.double().square().sum())
        error = mean - product(merged[layer]) if layer in merged else mean
        error = error - came[layer] if layer in came else error
        error_square += float(error.double().square().sum())
    return (error_square / mean_square) ** 0.5 if mean_square > 0 else None


def _came(aggregated: Tensors, before: Tensors) -> dict[str, Tensor]:
    """Return what a round added to the merged knowledge of each layer, (o, i)."""
    names = [name for name in aggregated if residual.is_residual(name) and name in before]
    return {str(layer_of(name)): aggregated[name] - before[name] for name in names}


def _complete(tensors: Tensors, slot: str) -> dict[str, Pair]:
    """Return the pairs of a slot; none when only one of the factors is there."""
    sides = {side_of(name) for name in tensors if slot_of(name) == slot}
    return pairs(tensors, slot) if sides == {"A", "B"} else {}


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def round_diagnostics(
    server: Tensors,
    aggregated: Tensors,
    replies: Sequence[Reply],
    after: Mapping[str, object],
    noise: Mapping[str, Any],
) -> dict[str, object]:
    """Return everything logged about the geometry of one round; ``after`` is the overlap per site after averaging.

    Where the server's ``noise`` (:meth:`confrere.method.Method.release`) hides the replies, nothing is made of them
    without it.
    """
    before = {r.site: r.metrics["overlap"] for r in replies if r.metrics.get("overlap")}
    return {
        "overlap_before": before or None,
        "overlap_after": {k: v for k, v in after.items() if v} or None,
        "aggregation_error": None if noise else aggregation_error(aggregated, replies, before=server),
        "similarity": None if noise else site_similarity(server, replies),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None

"""Linear algebra on low-rank pairs without ever forming a full matrix.

A pair is ``(A, B)`` with ``A: (r, i)`` and ``B: (o, r)``; its product ``B A: (o, i)`` is what the adapter
adds to a layer's weight (times the scale). Ranks may differ between pairs of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from confrere.adapters.names import layer_of, side_of, slot_of, tensor_name
from confrere.tensors import Tensors

Pair = tuple[Tensor, Tensor]


def pairs(tensors: Tensors, slot: str) -> dict[str, Pair]:
    """Return ``{layer: (A, B)}`` of one slot, sorted by layer; other tensors are ignored.

    Raises:
        KeyError: a layer has ``A`` without ``B``.
    """
    layers = {str(layer_of(n)) for n in tensors if slot_of(n) == slot and side_of(n) == "A"}
    return {
        layer: (tensors[tensor_name(layer, "A", slot)], tensors[tensor_name(layer, "B", slot)])
        for layer in sorted(layers)
    }


def named(factors: Mapping[str, Pair], slot: str) -> dict[str, Tensor]:
    """Undo :func:`pairs`: return the tensors of ``slot`` by canonical name."""
    flat = {}
    for layer, (a, b) in factors.items():
        flat[tensor_name(layer, "A", slot)] = a
        flat[tensor_name(layer, "B", slot)] = b
    return flat


def product(pair: Pair) -> Tensor:
    """Return ``B A`` (o, i) in full."""
    a, b = pair
    return b @ a


def concat(terms: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """Return one pair of summed rank whose product is ``sum_k w_k B_k A_k`` exactly."""
    weights = [1.0] * len(terms) if weights is None else weights
    return (
        torch.cat([a for a, _ in terms]),
        torch.cat([b * w if w != 1 else b for (_, b), w in zip(terms, weights, strict=True)], dim=1),
    )


def merge_slots(tensors: Tensors, slots: Iterable[str], into: str = "merged") -> dict[str, Tensor]:
    """Return all ``slots`` as one slot ``into`` of summed rank: the same function, the same scale."""
    factors = [pairs(tensors, slot) for slot in slots]
    layers = sorted({layer for each in factors for layer in each})
    return named({layer: concat([each[layer] for each in factors if layer in each]) for layer in layers}, into)


def cut(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    """Return the tensors with the first ``rank`` rows of every ``A`` and columns of every ``B``; others as they are."""
    sides = {name: side_of(name) for name in tensors}
    return {
        name: value[:rank].clone() if sides[name] == "A" else value[:, :rank].clone() if sides[name] == "B" else value
        for name, value in tensors.items()
    }


def refactor(pair: Pair, rank: int) -> Pair:
    """Return the best pair of ``rank`` for ``pair``'s product (least squares), with ``A A^T = B^T B``.

    QR of both factors, then the SVD of an r x r core, in float64; cost ``O((i + o) r^2)``. Signs are fixed,
    so that equal products give equal factors where singular values differ. A rank above ``pair``'s is padded
    with zeros.
    """
    a, b = (t.double() for t in pair)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, s.numel())
    left, right = (q_b @ u)[:, :kept], (v_t @ q_a.T)[:kept]
    peak = right.gather(1, right.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(right)
    root = s[:kept].sqrt()
    new_a, new_b = right * sign * root[:, None], left * sign.T * root
    if rank > kept:
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, rank - kept))
        new_b = torch.nn.functional.pad(new_b, (0, rank - kept))
    return new_a.to(pair[0]), new_b.to(pair[1])


def average_products(sent: Iterable[tuple[float, Tensors]], slot: str, rank: int | None = None) -> dict[str, Tensor]:
    """Return ``slot`` with the best rank-``rank`` factors of the weighted mean of the products ``B A``.

    Args:
        sent: ``(weight, tensors)`` of each site; ranks may differ between sites.
        slot: whose factors are averaged.
        rank: of the result; by default the largest rank sent for each layer.

    Raises:
        ValueError: nothing was sent, or the weights do not sum to a positive number.
    """
    received = [(weight, pairs(tensors, slot)) for weight, tensors in sent]
    total = float(sum(weight for weight, _ in received))
    if not received or not total > 0:
        raise ValueError("an average needs at least one site of positive weight")
    weights = [weight / total for weight, _ in received]
    result = {}
    for layer in received[0][1]:
        terms = [factors[layer] for _, factors in received]
        target = rank or max(a.shape[0] for a, _ in terms)
        result[layer] = refactor(concat(terms, weights), target)
    return named(result, slot)


def inner(left: Pair, right: Pair) -> Tensor:
    """Return ``<B1 A1, B2 A2>`` (Frobenius), float64, as ``sum (B1^T B2) * (A1 A2^T)``."""
    (a1, b1), (a2, b2) = left, right
    return ((b1.double().T @ b2.double()) * (a1.double() @ a2.double().T)).sum()


def norm(pair: Pair) -> Tensor:
    """Return ``||B A||_F``, float64."""
    return inner(pair, pair).clamp_min(0).sqrt()


def product_cosine(left: Pair, right: Pair) -> float | None:
    """Return ``|cos|`` of the two products in [0, 1]; None when one of them is zero."""
    size = float(norm(left) * norm(right))
    return min(1.0, abs(float(inner(left, right))) / size) if size > 0 else None


def row_overlap(left: Tensor, right: Tensor) -> float | None:
    """Return how much of the smaller row space of two ``A`` (r, i) lies in the other.

    0 is orthogonal, 1 contained: ``||Q1^T Q2||_F^2 / min(r1, r2)`` with orthonormal bases, which is the mean
    squared cosine of the principal angles.
    Random subspaces give about ``max(r1, r2) / i``. None when a factor is zero.
    """
    return column_overlap(left.T, right.T)


def column_overlap(left: Tensor, right: Tensor) -> float | None:
    """Return :func:`row_overlap` for the column spaces of two ``B`` (o, r)."""
    q_left, q_right = _basis(left), _basis(right)
    smaller = min(q_left.shape[1], q_right.shape[1])
    return min(1.0, float((q_left.T @ q_right).square().sum()) / smaller) if smaller else None


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis (d, rank) of the column space, without directions at rounding level."""
    u, s, _ = torch.linalg.svd(columns.detach().double(), full_matrices=False)
    floor = s.amax() * max(columns.shape) * torch.finfo(columns.dtype).eps
    basis: Tensor = u[:, (s > floor) & (s > 0)]
    return basis
